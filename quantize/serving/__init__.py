"""Packed checkpoints in transformers: registration, packed linears, the INT4 KV cache."""
