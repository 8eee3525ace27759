"""What a chapter opens, shows and keeps.

Reading order: `report`, `tables`, `plots`, `boxes` (interactive), `live_curves`, `benchmarks`.
"""
