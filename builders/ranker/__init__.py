"""Trains the model that scores every candidate for every task."""
