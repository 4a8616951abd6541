"""The part of the build that pyproject.toml cannot say: `conf/` becomes `heretic_ds/conf` in the wheel."""

import shutil
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithConfiguration(build_py):
    """Copies the configuration next to the modules, without anyone's personal defaults in `conf/local`."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "heretic_ds" / "conf"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "conf", target, ignore=shutil.ignore_patterns("local"))


setup(
    packages=[
        *find_packages(str(ROOT), include=["heretic_ds*"]),
        *find_namespace_packages(str(ROOT), include=["hydra_plugins*"]),
    ],
    cmdclass={"build_py": BuildWithConfiguration},
)
