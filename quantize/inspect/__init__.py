"""What a checkpoint holds and how it came about."""
