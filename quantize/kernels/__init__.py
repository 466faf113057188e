"""Triton kernels, each beside its plain-torch twin. Importing the package needs no Triton."""
