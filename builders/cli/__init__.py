"""The subcommands of `peregrine` that work offline: shop, build, compare, compile, report."""
