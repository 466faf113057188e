"""Routed experts from stacked weights."""
