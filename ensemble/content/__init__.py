"""Turns titles and pictures into vectors, without torch: offline, and for items that come while served."""
