"""Fields of the launcher. In a file of its own: Hydra runs plugin files without registering them as modules, which
dataclasses with postponed annotations need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, List, Optional  # noqa: UP035 (for the structured config)


@dataclass
class DeepSpeedLauncherConf:
    """How the ranks of each job are started: `hydra.launcher.*`."""

    _target_: str = "hydra_plugins.heretic_ds_launcher.deepspeed_launcher.DeepSpeedLauncher"
    num_gpus: Optional[int] = None  # noqa: UP045
    """Ranks on every node. null: one for every GPU (1 without GPUs), or what the hostfile says."""
    hostfile: Optional[str] = None  # noqa: UP045
    """Hosts to use, as in launch/hostfile.example. null: this machine."""
    num_nodes: Optional[int] = None  # noqa: UP045
    """How many hosts of the hostfile. null: all."""
    master_port: Optional[int] = None  # noqa: UP045
    """Where ranks meet. null: a free port for every job."""
    options: List[str] = field(default_factory=list)  # noqa: UP006
    """More options for `deepspeed`, as --name=value."""
    env: Dict[str, str] = field(default_factory=dict)  # noqa: UP006
    """More environment variables for every rank."""
