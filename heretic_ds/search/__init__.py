"""The multi-objective search over edits: its space, its exactly resumed study, the choice among trials."""

from heretic_ds.search.pareto import candidates, closest, pareto_front
from heretic_ds.search.study import Search
from heretic_ds.search.trials import Ask, TrialRecord, TrialScores

__all__ = ["Ask", "Search", "TrialRecord", "TrialScores", "candidates", "closest", "pareto_front"]
