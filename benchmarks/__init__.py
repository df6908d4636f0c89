"""Measurements against peers, side by side in one process; run as modules."""
