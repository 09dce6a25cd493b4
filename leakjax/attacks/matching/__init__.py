"""Attacks that match a whole gradient at once."""
