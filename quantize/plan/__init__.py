"""From the bytes of checkpoints to a deployment that meets its latency goals: what `pq plan` does."""
