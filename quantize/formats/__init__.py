"""Packed layouts: one declaration each, the only place where a layout is written down."""
