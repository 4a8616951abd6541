"""The wheel, installed elsewhere, has a working command with its own copy of the configuration."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

PARTS_OF_THE_BUILD = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "conf",
    "heretic_ds",
    "hydra_plugins",
)


def run(*command: str | os.PathLike[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command that has to succeed, without the checkout on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    return ended


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources that has someone's personal defaults in it."""
    source = tmp_path_factory.mktemp("source")
    for name in PARTS_OF_THE_BUILD:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    (source / "conf" / "local").mkdir(exist_ok=True)
    (source / "conf" / "local" / "default.yaml").write_text("# @package _global_\nsearch:\n  trials: 99\n")
    target = tmp_path_factory.mktemp("dist")
    pip_wheel = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir")
    run(sys.executable, *pip_wheel, target, source, cwd=source)
    [built] = target.glob("heretic_ds-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it, and the dependencies of this one by a path file."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    venv.create(folder, with_pip=False)
    [site_packages] = folder.glob("lib/python*/site-packages")
    pip = (sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"))
    # First the wheel, then the path file: pip would otherwise find an editable installation and stop there.
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    dependencies = sysconfig.get_path("purelib")
    (site_packages / "dependencies.pth").write_text(f"{dependencies}\n")
    return folder


def test_the_wheel_holds_configuration_and_demo(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"heretic_ds/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    expected -= {name for name in expected if name.startswith("heretic_ds/conf/local")}
    expected |= {
        str(path.relative_to(ROOT))
        for path in (ROOT / "heretic_ds").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "hydra_plugins").rglob("*.py")}
    assert expected - names == set()
    assert "hydra_plugins/__init__.py" not in names, "the namespace is shared with other plugins"
    assert not [name for name in names if "/local/" in name or name.startswith(("tests", "conf", "setup"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_installed_command_uses_its_own_configuration(installed: Path, tmp_path: Path) -> None:
    printed = run(installed / "bin" / "heretic-ds", "--cfg", "job", "my-model", cwd=tmp_path).stdout
    assert "path: my-model\n" in printed
    assert "  trials: 200\n" in printed, "the defaults, and not someone's conf/local"
    shown = run(installed / "bin" / "heretic-ds", "--info", "searchpath", "my-model", cwd=tmp_path).stdout
    assert str(installed) in shown
    assert str(ROOT / "conf") not in shown


def test_the_installed_command_knows_its_launcher(installed: Path, tmp_path: Path) -> None:
    ask = ("--cfg", "hydra", "hydra/launcher=deepspeed", "hydra.launcher.num_gpus=3", "my-model")
    printed = run(installed / "bin" / "heretic-ds", *ask, cwd=tmp_path).stdout
    assert "num_gpus: 3\n" in printed
    usage = run(installed / "bin" / "python", "-m", "heretic_ds.launching", "--help", cwd=tmp_path).stdout
    assert "--node-rank" in usage


def test_the_checkout_is_not_imported(installed: Path, tmp_path: Path) -> None:
    printed = run(
        installed / "bin" / "python", "-c", "import heretic_ds; print(heretic_ds.__file__)", cwd=tmp_path
    ).stdout
    assert Path(printed.strip()).is_relative_to(installed)


def test_the_installed_help(installed: Path, tmp_path: Path) -> None:
    for command in ((installed / "bin" / "heretic-ds",), (installed / "bin" / "python", "-m", "heretic_ds")):
        printed = run(*command, "--help", cwd=tmp_path).stdout
        assert "heretic-ds <model>" in printed
        assert "settings that belong together: demo" in printed
