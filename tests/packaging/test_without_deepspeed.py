"""The wheel in an environment without DeepSpeed and without a compiler: one device is served, the rest says why not.

By default the environment has links to all else that this one has. `make test-thorough` also makes one by pip, as
people do, which downloads PyTorch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from heretic_ds import needs
from tests.conftest import ROOT
from tests.packaging.conftest import Run

TORCH = os.environ.get("HERETIC_TORCH", "torch==2.13.0")
"""What pip installs as PyTorch; may hold options."""
FEW = [f"prompts.{kind}.{part}.slice=0:40" for kind in ("target", "baseline") for part in ("train", "eval")]
DEMO = ("experiment=demo", "search.trials=3", "search.startup_trials=2", "run.interactive=false", "run.dir=run", *FEW)
SENTENCE = f'needs DeepSpeed, which is not installed here: pip install "{needs.DEEPSPEED}"\n'


def needed_beside_deepspeed(wheel: Path) -> list[str]:
    """The requirements of a wheel without extras."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        told = message_from_bytes(archive.read(name))
    each = map(Requirement, told.get_all("Requires-Dist", []))
    plain = [one for one in each if one.marker is None or one.marker.evaluate({"extra": ""})]
    assert "deepspeed" in {one.name for one in plain}
    return [str(one) for one in plain if one.name != "deepspeed"]


def linked(site_packages: Path) -> None:
    """All that this environment has but DeepSpeed, this package, and path files that lead to them."""
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        apart = entry.name.lower().startswith(
            ("deepspeed", "heretic_ds", "heretic-ds", "__editable__", "hydra_plugins")
        )
        if not apart and entry.suffix != ".pth":
            (site_packages / entry.name).symlink_to(entry)


def installed(python: Path, wheel: Path, run: Run) -> None:
    """What pip makes of the requirements, in the versions that are tested together."""
    pins = python.parent / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins.write_text("\n".join(line for line in lines if not line.startswith("torch==")) + "\n")
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "-c", pins)
    run(*pip, *TORCH.split(), cwd=python.parent, timeout=1200)
    run(*pip, *needed_beside_deepspeed(wheel), cwd=python.parent, timeout=1200)


@pytest.fixture(
    scope="module",
    params=["linked", pytest.param("installed", marks=[pytest.mark.thorough, pytest.mark.timeout(2400)])],
)
def environment(
    request: pytest.FixtureRequest, wheel: Path, run: Run, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of the environment."""
    folder = tmp_path_factory.mktemp("bare") / "env"
    venv.create(folder, with_pip=request.param == "installed")
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    if request.param == "linked":
        [site_packages] = folder.glob("lib/python*/site-packages")
        linked(site_packages)
    else:
        installed(python, wheel, run)
    return folder


@pytest.fixture(scope="module")
def here(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which the demo has run."""
    folder = tmp_path_factory.mktemp("here")
    ended = heretic_ds(environment, folder, *DEMO)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


def heretic_ds(
    environment: Path, folder: Path, *words: str, program: tuple[str, ...] = ("heretic-ds",)
) -> subprocess.CompletedProcess[str]:
    """A command of the environment, for which there is no other program, and whose compilers fail."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PATH")}
    variables |= {"PATH": str(environment / "bin"), "CC": "false", "CXX": "false"}
    return subprocess.run(
        [environment / "bin" / program[0], *program[1:], *words],
        cwd=folder, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def test_there_is_no_deepspeed(environment: Path, tmp_path: Path) -> None:
    program = ("python", "-c", "import heretic_ds, deepspeed")
    ended = heretic_ds(environment, tmp_path, program=program)
    assert ended.stderr.endswith("ModuleNotFoundError: No module named 'deepspeed'\n")


def test_the_demo_and_its_report(here: Path) -> None:
    results = json.loads((here / "run" / "results.json").read_text())
    assert len(results["trials"]) == 3 and results["verified"]
    assert results["versions"]["deepspeed"] == "not installed"
    assert (here / "run" / "model" / "model.safetensors").is_file()
    assert "</html>" in (here / "run" / "report.html").read_text()


def test_an_export(environment: Path, here: Path) -> None:
    words = ("task=export", "export.trial=0", "export.dir=again", "export.format=both")
    ended = heretic_ds(environment, here, *DEMO, *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (here / "again" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("capture=zero3",), "capture=zero3"),
        (("run.launch=2", "model.device=cpu"), "starting ranks"),
    ],
)
def test_what_needs_deepspeed_says_what_to_install(
    environment: Path, tmp_path: Path, words: tuple[str, ...], what: str
) -> None:
    ended = heretic_ds(environment, tmp_path, *DEMO, *words)
    assert (ended.returncode, ended.stderr) == (2, f"heretic-ds: {what} {SENTENCE}")
    assert list(tmp_path.iterdir()) == []
