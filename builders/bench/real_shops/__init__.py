"""Turns public data sets into shops of ours; __main__.py says how."""
