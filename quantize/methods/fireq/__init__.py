"""FireQ (arXiv 2505.20839): linear layers and attention on an INT4 KV cache."""
