"""How many rows a batch may have for its memory, and had better have for its speed: found by measuring."""

from heretic_ds.runner.sizing.batches import Batches
from heretic_ds.runner.sizing.measure import SAFE_SHARE
from heretic_ds.runner.sizing.sizes import FITTING_TOKENS, PHASES, PROBE_TOKENS

__all__ = ["FITTING_TOKENS", "PHASES", "PROBE_TOKENS", "SAFE_SHARE", "Batches"]
