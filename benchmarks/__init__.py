"""Measurements beside peers, each side by side in one process; run as modules."""
