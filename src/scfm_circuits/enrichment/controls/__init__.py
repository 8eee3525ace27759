"""Table 4 beside lists and features that mean nothing, and beside features that mean something.

Reading order: `layer_counts`, `tables`, `planted_features`, `other_dictionaries`.
"""
