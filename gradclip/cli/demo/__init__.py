"""The demo: one character model trained twice, without and with clipping.

Begin with ``run.py``, then read ``training.py``.
"""
