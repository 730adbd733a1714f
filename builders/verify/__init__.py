"""Asks the staged release about held-out users and writes down how good its lists are."""
