"""What the paper says, and the ledger.

Reading order: `exhibits` (as printed), `internal_checks`, `case` (its case recomputed),
`run_values`, `claims`.
"""
