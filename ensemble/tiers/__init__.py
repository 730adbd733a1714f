"""Feature rows from the nearest place that has them: memory (L1), Redis (L2), the release's snapshot, the
default row."""
