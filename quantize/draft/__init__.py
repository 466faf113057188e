"""Whether a checkpoint is a good draft model for its parent: speculative decoding, measured and replayed."""
