"""Other packages for clipping: their cost, and how they fare at what breaks clippers."""
