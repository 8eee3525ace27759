"""What the paper says, and the ledger.

Reading order: `exhibits` (as printed), `case` (its case recomputed), `intervals` (statements with
their uncertainty), `internal_checks`, `run_values`, `claims`.
"""
