"""One page about a run, made of what is in its folder; it loads nothing from anywhere else."""
