"""The parts of a run as functions, for programs: ``import heretic_ds as hd`` offers them."""
