"""Formats in which models are published small, read as 16-bit ones: a file for each."""
