"""Speed of the kernels for packed INT4 weights and caches, beside what torch offers for the same work."""
