"""The same on a CUDA device, with its launches and its memory bandwidth."""
