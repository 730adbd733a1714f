"""Holds the contract and the online path: numpy, faiss, onnxruntime; never torch, never builders."""
