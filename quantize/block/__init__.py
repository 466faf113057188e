"""One decoder block while it is converted: inputs, moments, smoothing,
and what streams through it."""
