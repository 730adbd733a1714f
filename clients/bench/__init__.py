"""Measures a running server: latency, throughput, cost, faults, and the twin beside it."""
