"""`python -m heretic_ds`: the same as the `heretic-ds` command."""

import sys

from heretic_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
