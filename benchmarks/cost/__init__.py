"""What clipping, rules, logging and ranks cost, beside torch's own functions."""
