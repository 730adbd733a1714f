"""Replaces two servers behind the gateway while they are asked, as Kubernetes would: `make rolling`."""
