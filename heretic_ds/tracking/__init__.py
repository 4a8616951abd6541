"""Trackers of experiments, one file each: ``tracking=tensorboard|mlflow|trackio|wandb``."""

from __future__ import annotations

import importlib.util

from heretic_ds.errors import UserError
from heretic_ds.settings.checks import find_class
from heretic_ds.settings.tracking import TrackingSettings
from heretic_ds.tracking.base import Tracker

NONE = "none"
_BY_NAME = {
    "tensorboard": "heretic_ds.tracking.tensorboard.TensorBoard",
    "mlflow": "heretic_ds.tracking.mlflow.MLflow",
    "trackio": "heretic_ds.tracking.trackio.Trackio",
    "wandb": "heretic_ds.tracking.wandb.WeightsAndBiases",
}
_DASHBOARD, _DASHBOARD_EXTRA = "optuna_dashboard", "track"


def make_tracker(settings: TrackingSettings) -> Tracker | None:
    """The tracker that the settings name, not yet started. Raises UserError where it, or what it needs, is missing."""
    if settings.dashboard and not has_dashboard():
        raise UserError(_missing("tracking.dashboard=true", _DASHBOARD, _DASHBOARD_EXTRA))
    if settings.name == NONE:
        return None
    path = _BY_NAME.get(settings.name, settings.name)
    if "." not in path:
        names = ", ".join((NONE, *_BY_NAME))
        raise UserError(f"tracking.name is {path!r}; choose one of {names}, or the dotted path of a class of your own")
    kind: type[Tracker] = find_class(path, "tracking.name", Tracker)
    if kind.package is not None and importlib.util.find_spec(kind.package) is None:
        raise UserError(_missing(f"tracking={settings.name}", kind.package, kind.extra))
    return kind(settings)


def has_dashboard() -> bool:
    """Whether optuna-dashboard is installed."""
    return importlib.util.find_spec(_DASHBOARD) is not None


def _missing(asked: str, package: str, extra: str | None) -> str:
    install = f'"heretic-ds[{extra}]"' if extra else package
    return f"{asked} needs {package.replace('_', '-')}, which is not installed: pip install {install}"
