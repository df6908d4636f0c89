"""Trainings whose gradients are corrupted, with clipping and without."""
