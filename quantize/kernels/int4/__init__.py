"""INT4 weights times FP8 or 16-bit activations."""
