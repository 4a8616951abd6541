"""Where a decoder's residual stream runs and which weights write to it."""

from heretic_ds.anatomy.find import find_anatomy, has_expert_dispatch
from heretic_ds.anatomy.model import Anatomy, Writer
from heretic_ds.anatomy.packing import four_bits_unpacked, is_packed, packed_modules, scales, unpacked
