"""The offline path: a shop's data in, an immutable release in the model repository out."""
