"""Reads a shop's columns: times, ids, numbers, labels, categories, one file each. Whoever reads a column
does it here, and says what it was taken for (column.Said)."""
