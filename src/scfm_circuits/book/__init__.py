"""Notebooks into a book; no number comes from here.

Reading order: `cli`, `chapters` (what is stale, and why), `execution`, `gate`, `provenance`,
`pages`, `downloads`, `sizes` and `preflight` (what a run will cost), `first_profile`.
"""
