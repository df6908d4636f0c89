"""Other packages for clipping: their cost, and their results in situations that break clippers."""
