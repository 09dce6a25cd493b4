"""What shapes alone allow a gradient to tell, counted in microseconds."""
