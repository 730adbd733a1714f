"""Removes weights, channels and heads that matter least."""
