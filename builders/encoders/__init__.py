"""Trains the encoders whose embeddings recall searches with and in."""
