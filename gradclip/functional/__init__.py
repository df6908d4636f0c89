"""Clipping without a hook: torch's names, units, through time, and compiled operators."""
