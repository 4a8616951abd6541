"""Everything between a model's files and its modules; what is exported here reads a rank's part of every parameter."""

from heretic_ds.checkpoint.files import TensorFiles, as_if_not_packed
from heretic_ds.checkpoint.fill import Checkpoint, fill
from heretic_ds.checkpoint.shards import Shard, split
from heretic_ds.checkpoint.skeleton import parameters_on_meta
