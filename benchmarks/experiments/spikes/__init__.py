"""Trainings with corrupted gradients, clipped in several ways and not at all."""
