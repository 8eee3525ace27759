"""Figures 4 and 5 and what tests them.

Reading order: `frozen`, `attribution`, `circuit`, `search`, `contrast`, `calls`, `direct_effects`,
`graph`, `graph_scores`, `exports`, `view`; then `interventions` (with `token_means`), `prediction`,
`structure`, `studies`, `perturbation`, `perturbed_cells`, `knock_out`, `task_circuit`,
`task_curves`, `case_study`, `case_targets`, `planted_genes`, `known_response`, `directions`,
`steering`, `steering_curves`, `wrong_calls`, `origins`.
"""
