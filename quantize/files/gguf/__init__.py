"""GGUF files: their container, writing one from parts, and reading one as a checkpoint."""
