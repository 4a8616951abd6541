"""What a person sees of a run: one line per trial, progress, the Pareto table, the plot."""

from heretic_ds.report.plots import plot_front
from heretic_ds.report.progress import SearchProgress, duration
from heretic_ds.report.tables import pareto_table, trial_line

__all__ = ["SearchProgress", "duration", "pareto_table", "plot_front", "trial_line"]
