"""What a gradient says of a layer's input: forward, gradient and pull-back constraints, and priors."""
