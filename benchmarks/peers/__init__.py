"""Other packages for clipping: their cost, and their results in hazards."""
