"""Gene sets, over-representation, null lists.

Reading order: `gene_sets`, `background`, `rules`, `over_representation` (with `kernels`), `terms`,
`null_lists`, `significance`, `prerank`; `controls` sets Table 4 beside them.
"""
