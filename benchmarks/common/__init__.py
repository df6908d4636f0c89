"""What the benchmarks share: gradients, shapes of models, timing and tables."""
