"""Encodes a catalogue's titles and pictures with pretrained encoders, and keeps what was encoded."""
