"""Turns a shop's tables into rows, histories, splits and impressions."""
