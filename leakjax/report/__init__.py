"""Records, tables and figures: the only place where a reconstruction meets the truth."""
