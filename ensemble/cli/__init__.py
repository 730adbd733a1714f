"""The subcommands of `peregrine` that need the online path only: serve, features."""
