"""Finds, configures, starts, watches and stops tritonserver."""
