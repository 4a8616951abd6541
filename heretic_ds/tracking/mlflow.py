"""MLflow: a run on a tracking server, or in a folder or database of this machine."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heretic_ds.tracking.base import RunFacts, Tracker, metrics_of, outcome_of

if TYPE_CHECKING:
    from heretic_ds.search.trials import TrialRecord

_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
"""How long a server that does not answer keeps the search waiting, once; MLflow's own defaults are minutes."""


class MLflow(Tracker):
    """Settings as parameters, numbers of trials as metrics whose step is the index, results and picture as files."""

    package, extra = "mlflow", "mlflow"

    def start(self, facts: RunFacts) -> str:
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        uri = self.settings.uri or os.environ.get("MLFLOW_TRACKING_URI") or facts.folder.resolve().as_uri()
        if "://" not in uri or uri.startswith("file:"):  # MLflow 3.13 and later ask whether that is meant
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client, self._steps = MlflowClient(tracking_uri=uri), facts.told
        known = self._known(facts.run)
        if known is None:
            found = self._client.get_experiment_by_name(self.settings.project)
            experiment = found.experiment_id if found else self._client.create_experiment(self.settings.project)
            self._run: str = self._client.create_run(experiment, run_name=facts.model).info.run_id
            params = [Param(_name(key), str(value)) for key, value in facts.parameters.items()]
            self._client.log_batch(self._run, params=params, tags=[RunTag("command", facts.command)])
        else:
            self._run = known
        return self._run

    def _known(self, run: str | None) -> str | None:
        """The run of an earlier part, opened again; None where the server has it no more."""
        from mlflow.exceptions import MlflowException

        if run is None:
            return None
        try:
            self._client.update_run(run, status="RUNNING")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run

    def trial(self, record: TrialRecord) -> None:
        self._log(metrics_of(record), record.index)
        self._steps = record.index + 1

    def end(self, results: Mapping[str, Any], files: Sequence[Path]) -> None:
        self._log(outcome_of(results), self._steps)
        for file in files:
            self._client.log_artifact(self._run, str(file))
        self._client.set_terminated(self._run)

    def interrupted(self) -> None:
        self._client.set_terminated(self._run, status="KILLED")

    def _log(self, numbers: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_name(name), value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self._run, metrics=metrics)


def _name(name: str) -> str:
    """A name of those characters that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", name)
