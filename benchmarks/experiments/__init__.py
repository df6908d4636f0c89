"""Experiments on the effect of clipping on trainings."""
