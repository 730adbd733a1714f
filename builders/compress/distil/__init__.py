"""Trains a small student on what its teacher says, attends to and relates."""
