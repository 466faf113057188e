"""Which recipe for a model, where it is to run: what fits, what runs it, what it costs."""
