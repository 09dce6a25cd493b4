"""Attacks on models that take ids of tokens."""
