"""Turns checkpoints into ONNX models, and stages all that will be served in one folder."""
