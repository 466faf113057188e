"""Files for llama.cpp: packed blocks, names, metadata, tokenizers, and the format that they make."""
