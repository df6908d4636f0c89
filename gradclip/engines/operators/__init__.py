"""The engine of torch operators, for any device and without a compiled library."""
