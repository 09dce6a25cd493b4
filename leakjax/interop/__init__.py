"""Captures of other frameworks."""
