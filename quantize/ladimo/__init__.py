"""Pieces of LaDiMo (arXiv 2408.04278): splitting a dense FFN into experts, routing, distillation, and the budget."""
