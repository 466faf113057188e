"""What the commands do, as functions that take the same arguments; `import quantize` offers them."""
