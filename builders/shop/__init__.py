"""Reads, checks, imports and generates shops: shop.toml and its tables."""
