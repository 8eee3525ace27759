"""The dictionaries: weights, training on all layers, validation (Tables 1, 2), other kinds.

Reading order: `transcoder`, `training`, `active_entries`, `validation`, `variants`.
"""
