"""Holds the subcommands of `peregrine` that need the online path only, and the options that all share."""
