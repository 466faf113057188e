"""What a decoder is: its row, its blocks on the device, its linears,
experts, RoPE and attention."""
