"""The first step of every attack: what the last layer's gradient says of its input and of the labels."""
