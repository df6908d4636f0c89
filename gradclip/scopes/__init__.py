"""Axis 1 of clipping: which gradients share a norm."""
