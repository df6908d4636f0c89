"""Measurements of gradclip beside its peers, interleaved in one process; run as modules."""
