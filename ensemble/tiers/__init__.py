"""Reads feature rows from the nearest place that has them: memory (L1), Redis (L2), the snapshot, the default
row."""
