"""Attention over an INT4 or FP8 KV cache."""
