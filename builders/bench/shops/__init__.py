"""Says whether the product still ranks real shops as well as it did; __main__.py says how."""
