"""Several processes that convert or evaluate together."""
