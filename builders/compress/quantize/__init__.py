"""Gives every node the smallest precision that ranking allows."""
