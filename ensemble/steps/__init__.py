"""Holds the steps of a request that are not engines, one file each."""
