"""How much an architecture leaks, and why: ranks, index, spectrum, leakage map, noise bound, advice."""
