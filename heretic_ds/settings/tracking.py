"""The group ``tracking`` of :mod:`heretic_ds.settings`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional


@dataclass
class TrackingSettings:
    """Who follows a search beside the run folder; ``docs/tracking.md``."""

    name: str = "none"
    """``none``, ``tensorboard``, ``mlflow``, ``trackio``, ``wandb``, or the dotted path of a class of your own, derived
    from ``heretic_ds.tracking.base.Tracker``."""
    project: str = "heretic_ds"
    """Project of Trackio and Weights & Biases, experiment of MLflow."""
    dir: Optional[str] = None
    """Folder of what a tracker writes on this machine; null: ``<run.dir>/tracking``."""
    uri: Optional[str] = None
    """Tracking server or store of MLflow; null: ``MLFLOW_TRACKING_URI``, else a store in ``tracking.dir``."""
    dashboard: Optional[bool] = None
    """Whether the study gets a note and, as artifacts, the run's report and picture, for optuna-dashboard; null: where
    that is installed."""
