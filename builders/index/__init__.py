"""Builds what recall reads: the Faiss index, transitions, the popular list and the weights of the sources."""
