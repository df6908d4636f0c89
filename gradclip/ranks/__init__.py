"""Many processes: parts of one gradient on several ranks, whose power sums are combined."""
