"""Puts a finished release into the model repository, whole or not at all."""
