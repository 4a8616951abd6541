"""Groups of settings that stand outside :mod:`heretic_ds.settings`, which has the whole."""
