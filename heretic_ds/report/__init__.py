"""What a person sees of a run: one line per trial, progress, the Pareto table, the plot, the page about it."""
