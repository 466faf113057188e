"""The accuracy gate: baselines with tolerances, checks and their update."""
