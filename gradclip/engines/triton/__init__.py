"""The engine of Triton kernels for CUDA: two launches per step."""
