"""Cost of clipping, rules, logging and ranks, beside torch's own functions."""
