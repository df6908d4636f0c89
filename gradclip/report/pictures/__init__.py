"""Pictures of runs, drawn with matplotlib: panels of norms, distributions and a heat map."""
