"""Checkpoints in FP8 and MXFP4 as if they were not: their headers, and any part of their numbers."""

from heretic_ds.checkpoint.packed.headers import METHODS, PackedInfo, stored_bytes, unpacked_headers
from heretic_ds.checkpoint.packed.numbers import Unpacking
