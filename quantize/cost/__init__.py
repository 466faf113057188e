"""What work costs: bytes from sizes alone, measured peaks, clocks, and how people write them."""
