"""Small random models of every type that the installed transformers knows, and sweeps over them."""
