"""What each feature fires on, and features that learnt nothing.

Reading order: `counting` (with `pair_counts`), `statistics`, `gene_lists`,
`contexts`, `baselines`, `unit_scores`, `known_truth`.
"""
