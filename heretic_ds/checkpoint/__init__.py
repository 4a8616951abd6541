"""Loading only a part of every parameter, straight from the weight files: no rank ever holds the whole model."""

from heretic_ds.checkpoint.files import TensorFiles
from heretic_ds.checkpoint.fill import Checkpoint, fill
from heretic_ds.checkpoint.shards import Shard, split
from heretic_ds.checkpoint.skeleton import parameters_on_meta

__all__ = ["Checkpoint", "Shard", "TensorFiles", "fill", "parameters_on_meta", "split"]
