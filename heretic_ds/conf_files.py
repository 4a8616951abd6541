"""Where the configuration files are, for those who must not wait for what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def conf_dir() -> Path:
    """Folder of the configuration files: the checkout's `conf/`, or the copy in an installed package."""
    package = Path(__file__).resolve().parent
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "conf" / "config.yaml").is_file():
        return checkout / "conf"
    return package / "conf"


def choices(group: str) -> list[str]:
    """The choices of a group: the names of its files."""
    return sorted(file.stem for file in (conf_dir() / group).glob("[!_]*.yaml"))


def choice(group: str, name: str) -> dict[str, Any]:
    """What the file of one choice of a group gives."""
    from omegaconf import OmegaConf  # a third of a second

    given: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / group / f"{name}.yaml"))
    return given


def option_owners(group: str) -> dict[str, list[str]]:
    """The options that the files of a group give, each with the choices that have it."""
    owners: dict[str, list[str]] = {}
    for name in choices(group):
        for option in choice(group, name):
            if option != "_target_":
                owners.setdefault(option, []).append(name)
    return owners
