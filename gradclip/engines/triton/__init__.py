"""The engine of Triton kernels: CUDA, two launches a step."""
