"""Rounding to E4M3 per token."""
