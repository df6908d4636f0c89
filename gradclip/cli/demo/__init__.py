"""The demo: a character model trained twice, without clipping and with it.

To read it, begin with ``run.py``, then ``training.py``.
"""
