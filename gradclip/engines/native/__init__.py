"""The engine in C for the CPU: power sums to float64 accuracy, scaling and clamping."""
