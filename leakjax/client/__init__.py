"""What a client computes and sends: an update, a defense, an observation."""
