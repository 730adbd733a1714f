"""Searches the settings of a build for those that are worth most to a shop."""
