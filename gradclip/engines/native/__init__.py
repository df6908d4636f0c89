"""The engine in C: float64-accurate sums of tensors on the CPU."""
