"""The wheel, installed elsewhere, has a working command with its own copy of the configuration."""

from __future__ import annotations

import email
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.packaging.conftest import Run


@pytest.fixture(scope="module")
def installed(wheel: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
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


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        told = email.message_from_bytes(archive.read(name))
    assert str(told["Description-Content-Type"]).startswith("text/markdown")
    assert str(told.get_payload()).lstrip().startswith("# heretic_ds\n")
    assert (told["License-Expression"], told["License-File"]) == ("Apache-2.0", "LICENSE")
    assert told.get_all("Project-URL")
    systems = {each for each in told.get_all("Classifier", []) if each.startswith("Operating System")}
    assert systems == {"Operating System :: POSIX :: Linux", "Operating System :: MacOS"}


def test_a_source_distribution_makes_the_same_wheel(source: Path, wheel: Path, run: Run, tmp_path: Path) -> None:
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=source)
    [archive] = tmp_path.glob("heretic_ds-*.tar.gz")
    pip_wheel = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir")
    run(sys.executable, *pip_wheel, tmp_path, archive, cwd=tmp_path)
    [built] = tmp_path.glob("heretic_ds-*.whl")
    assert sorted(zipfile.ZipFile(built).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_the_installed_command_uses_its_own_configuration(installed: Path, run: Run, tmp_path: Path) -> None:
    printed = run(installed / "bin" / "heretic-ds", "--cfg", "job", "my-model", cwd=tmp_path).stdout
    assert "path: my-model\n" in printed
    assert "  trials: 200\n" in printed, "the defaults, and not someone's conf/local"
    shown = run(installed / "bin" / "heretic-ds", "--info", "searchpath", "my-model", cwd=tmp_path).stdout
    assert str(installed) in shown
    assert str(ROOT / "conf") not in shown


def test_the_installed_command_knows_its_launcher(installed: Path, run: Run, tmp_path: Path) -> None:
    ask = ("--cfg", "hydra", "hydra/launcher=deepspeed", "hydra.launcher.num_gpus=3", "my-model")
    printed = run(installed / "bin" / "heretic-ds", *ask, cwd=tmp_path).stdout
    assert "num_gpus: 3\n" in printed
    usage = run(installed / "bin" / "python", "-m", "heretic_ds.launching", "--help", cwd=tmp_path).stdout
    assert "--node-rank" in usage


def test_the_checkout_is_not_imported(installed: Path, run: Run, tmp_path: Path) -> None:
    printed = run(
        installed / "bin" / "python", "-c", "import heretic_ds; print(heretic_ds.__file__)", cwd=tmp_path
    ).stdout
    assert Path(printed.strip()).is_relative_to(installed)


def test_the_installed_help(installed: Path, run: Run, tmp_path: Path) -> None:
    for command in ((installed / "bin" / "heretic-ds",), (installed / "bin" / "python", "-m", "heretic_ds")):
        printed = run(*command, "--help", cwd=tmp_path).stdout
        assert "heretic-ds <model>" in printed
        assert "settings that belong together: demo" in printed
