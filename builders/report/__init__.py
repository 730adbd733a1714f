"""Draws what a release is and costs, for people: `peregrine report`."""
