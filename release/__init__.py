"""Building, checking and trying what is published; no part of the package imports it."""
