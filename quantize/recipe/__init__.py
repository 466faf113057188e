"""Recipes: YAML → strict frozen stages, and the overrides of the command line."""
