"""Measures what no test can: index sizes, public embeddings, and everything that a GPU host can prove."""
