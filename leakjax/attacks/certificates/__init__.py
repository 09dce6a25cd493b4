"""What an answer proves, and what else there could be: other images, factors, noise."""
