"""SBVR (arXiv 2509.18172): weights as sums of bit vectors with coefficients from a codebook."""
