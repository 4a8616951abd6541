"""Loading only a part of every parameter, straight from the weight files: no rank ever holds the whole model."""

from heretic_ds.sharded_loading.files import TensorFiles
from heretic_ds.sharded_loading.fill import Checkpoint, fill
from heretic_ds.sharded_loading.shards import Shard, split
from heretic_ds.sharded_loading.skeleton import parameters_on_meta

__all__ = ["Checkpoint", "Shard", "TensorFiles", "fill", "parameters_on_meta", "split"]
