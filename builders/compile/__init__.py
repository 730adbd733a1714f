"""Turns a release's typed ONNX models into TensorRT plans, on the node that will run them."""
