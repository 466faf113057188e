"""Speed of the kernels on a GPU beside torch's."""
