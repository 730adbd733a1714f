"""Talking to a served release over gRPC: tritonclient and ensemble.contract, nothing heavier."""
