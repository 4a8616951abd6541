"""Where the configuration files are, for those who must not wait for what reads them."""

from __future__ import annotations

from pathlib import Path


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
