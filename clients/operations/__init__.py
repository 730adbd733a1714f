"""Changes what a running server serves: its releases."""
