"""Requests through engines in continuous batching, event by event, on GPUs they may share."""
