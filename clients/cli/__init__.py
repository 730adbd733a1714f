"""The subcommands of `peregrine` that talk to a running server: recommend, release, events, items, bench."""
