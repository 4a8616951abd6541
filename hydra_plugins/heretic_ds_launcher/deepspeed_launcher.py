"""`heretic-ds --multirun hydra/launcher=deepspeed ...`: each job of the sweep is a `deepspeed` job of its own.

Hydra imports this module whenever it looks for plugins, so the imports that do the work wait until it is chosen.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from hydra_plugins.heretic_ds_launcher._config import DeepSpeedLauncherConf

if TYPE_CHECKING:
    from heretic_ds.launching.plan import Launch
    from heretic_ds.launching.supervisor import Outcome, Supervised
    from heretic_ds.settings import Settings

Objective = tuple[float, float]


ConfigStore.instance().store(
    group="hydra/launcher", name="deepspeed", node=DeepSpeedLauncherConf, provider="heretic_ds_launcher"
)


class DeepSpeedLauncher(Launcher):
    """Runs the jobs one after another; each takes all the ranks. A failing job does not end the sweep."""

    def __init__(
        self,
        num_gpus: int | None,
        hostfile: str | None,
        num_nodes: int | None,
        master_port: int | None,
        options: Sequence[str],
        env: Mapping[str, str],
    ) -> None:
        super().__init__()
        self._fields = (num_gpus, hostfile, num_nodes, master_port, tuple(options), env)
        self._context: HydraContext | None = None
        self._config: DictConfig | None = None
        self._hosts: Mapping[str, int] | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """What Hydra gives before `launch`. The task function is not used: the ranks have their own.

        Raises UserError for fields that no job could be started with.
        """
        from heretic_ds.errors import UserError
        from heretic_ds.launching import nodes
        from heretic_ds.launching.plan import Launch

        ranks, hostfile, limit, port, options, env = self._fields
        if limit not in (None, 1) and hostfile is None:
            raise UserError(f"hydra.launcher.num_nodes={limit} needs hydra.launcher.hostfile, a list of the nodes")
        self._hosts = None if hostfile is None else nodes.read_hostfile(Path(hostfile), limit)
        variables = {name: str(value) for name, value in env.items()}
        self._launch = Launch(ranks=ranks, master_port=port, options=options, env=variables)
        self._context, self._config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs. Returns their objectives, (nan, nan) for one that failed."""
        if self._context is None or self._config is None:
            raise RuntimeError("Hydra has to call setup before launch")
        setup_globals()
        Path(self._config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        returns = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            config = self._context.config_loader.load_sweep_config(self._config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            job = run_job(
                hydra_context=self._context,
                task_function=self._run_job,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
            _ = job.return_value  # raises what was not the job's own failure
            returns.append(job)
        return returns

    def _run_job(self, config: DictConfig) -> Objective | None:
        from heretic_ds.cli import sweep_job

        return sweep_job(config, self._run_ranks)

    def _run_ranks(self, settings: Settings) -> Objective | None:
        """Start the ranks of a job whose settings were found good, and wait for them."""
        folder = _run_dir(settings)
        _run(self._job(_rank_arguments(HydraConfig.get(), folder)))
        return read_objective(folder / "results.json")

    def _job(self, arguments: Sequence[str]) -> Supervised:
        from dataclasses import replace

        from heretic_ds.launching.nodes import Cluster
        from heretic_ds.launching.supervisor import Supervisor

        launch: Launch = replace(self._launch, arguments=tuple(arguments))
        return Supervisor(launch) if self._hosts is None else Cluster(launch, self._hosts)


def _run(job: Supervised) -> None:
    """Wait for a job. Raises how it failed: as the error that its ranks had, or as this process's own end."""
    from heretic_ds.cli import EXIT_INTERRUPTED, EXIT_USER_ERROR
    from heretic_ds.errors import SearchFailed, UserError
    from heretic_ds.launching.supervisor import signals_to

    with signals_to(job):
        outcome: Outcome = job.run()
    if outcome.signal is not None and outcome.signal != signal.SIGINT:
        signal.signal(outcome.signal, signal.SIG_DFL)
        os.kill(os.getpid(), outcome.signal)
    if outcome.signal == signal.SIGINT or outcome.status == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if outcome.status != 0:
        *story, last = (outcome.error or f"the ranks ended with status {outcome.status}").splitlines()
        if story:
            print("\n".join(story), flush=True)
        message = last.removeprefix("heretic-ds: ")
        raise UserError(message) if outcome.status == EXIT_USER_ERROR else SearchFailed(message)


def _run_dir(settings: Settings) -> Path:
    """The folder of one job; `run.dir` unless somebody took it away from the sweep by `run.dir=null`."""
    from heretic_ds.foreign.reading import path_of

    if settings.run.dir is not None:
        return path_of(settings.run.dir, "run.dir")
    from heretic_ds.stages.opening import run_dir

    return run_dir(settings)


def _rank_arguments(hydra: Any, folder: Path) -> list[str]:
    """The command line of one job's ranks. The run folder is named in it, so that it is decided once; and ranks have
    no terminal for a menu."""
    decided = ("run.dir=", "run.interactive=")
    own = [word for word in hydra.overrides.task if not word.lstrip("+").startswith(decided)]
    searched = [word for word in hydra.overrides.hydra if word.startswith("hydra.searchpath=")]
    flags = ["--config-name", hydra.job.config_name]
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            flags += ["--config-dir", source.path]
    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    return [*flags, *searched, *own, f"run.dir='{quoted}'"]


def read_objective(results: Path) -> Objective | None:
    """(refusal rate, KL divergence in nats) of a run's verified edit; None where the run verified none."""
    if not results.is_file():
        return None
    from heretic_ds.foreign.reading import read_json

    found = read_json(results)
    verified = found.get("verified")
    return None if verified is None else (verified["refusals"] / found["prompts"]["target_eval"], verified["kl"])
