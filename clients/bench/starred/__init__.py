"""Runs the faults that must not be felt against a real server, in both ways of serving (__main__.py)."""
