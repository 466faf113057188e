"""The conversion: the loop over blocks, its plan and state, allocation and estimates."""
