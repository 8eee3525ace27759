"""The interactive parts of a page: circuits, the index of features, the rating page."""
