"""The recursion of R-GAP and COPA: last layer to first, one system after another."""
