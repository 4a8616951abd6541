"""The multi-objective search over edits: its space, its exactly resumed study, the choice among trials."""
