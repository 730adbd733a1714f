"""Searches item embeddings: the main index, what changed since, and what a request may be shown."""
