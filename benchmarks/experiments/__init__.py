"""Answers to scientific questions: what clipping does to trainings."""
