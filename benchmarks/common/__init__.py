"""Parts that the benchmarks share: gradients, shapes of models, timing and tables."""
