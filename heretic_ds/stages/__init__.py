"""The stages of a run, in the order in which :mod:`heretic_ds.pipeline` tells them."""
