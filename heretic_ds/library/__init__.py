"""The parts of a run as functions, for programs: ``import heretic_ds as hd`` offers them."""

from heretic_ds.errors import UserError
from heretic_ds.needs import unfit_system

if unfit := unfit_system():
    raise UserError(unfit)
