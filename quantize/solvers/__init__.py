"""Numerical solvers that methods share: grids, error feedback and descent, the knapsack."""
