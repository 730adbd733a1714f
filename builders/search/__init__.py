"""Writes what a search reads, and fits how it orders what it finds."""
