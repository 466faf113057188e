"""pq: offline post-training quantization that ends in a checkpoint you can serve."""

__version__ = "0.1.0"
