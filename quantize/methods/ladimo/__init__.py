"""LaDiMo (arXiv 2408.04278): dense FFNs become Mixtures of Experts by layer-wise distillation."""
