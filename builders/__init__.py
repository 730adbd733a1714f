"""Turns a shop's data into an immutable release in the model repository: the offline path."""
