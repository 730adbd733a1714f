"""Opens releases for reading and keeps the repository's shape on disk."""
