"""Final losses against the learning rate, by the way to clip."""
