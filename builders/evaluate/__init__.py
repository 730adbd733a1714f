"""Asks a release that has been published about users at a time that its model has not seen."""
