"""Weights as sums of bit vectors, multiplied without decompression."""
