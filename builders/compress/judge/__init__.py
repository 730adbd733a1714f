"""Says what a compressed model costs in ranking, in time and in bytes, and passes or fails it."""
