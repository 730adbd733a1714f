"""Changes what a running server serves."""
