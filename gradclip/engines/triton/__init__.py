"""Triton kernels for CUDA: two launches a step."""
