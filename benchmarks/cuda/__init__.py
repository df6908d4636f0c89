"""Cost of clipping on a CUDA device, with its launches and its memory bandwidth."""
