"""Benchmarks of kernels, fits and experts beside named baselines."""
