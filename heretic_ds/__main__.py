"""`python -m heretic_ds`: the same as the `heretic-ds` command, and what launchers start as ranks."""

import sys

from heretic_ds.cli import main
from heretic_ds.launching import rank_guard

if __name__ == "__main__":
    sys.exit(rank_guard.run(main))
