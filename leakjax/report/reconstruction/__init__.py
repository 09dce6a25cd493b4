"""The record of a reconstruction, its table and its figure."""
