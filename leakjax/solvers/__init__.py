"""Solvers: each takes a system and knows nothing of layers."""
