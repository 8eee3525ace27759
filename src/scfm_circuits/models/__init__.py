"""The model that is explained: load or train it, read and replace its MLPs, ask it.

Reading order: `architectures` (where a family's parts are), `loading`, `small_models`, `mlp_sites`,
`answers`, `known_types`. Imports neither scanpy, anndata, gseapy nor pandas.
"""
