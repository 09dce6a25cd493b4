"""This machine: precision, memory, cores, devices, and the programs that are compiled for them."""
