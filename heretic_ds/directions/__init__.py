"""How directions are found: each method takes what it needs of the residuals, and gives directions to edit along.

``METHODS`` has a class for every ``direction.method``; a new one is a class beside these and a name there.
"""

from heretic_ds.directions.base import Captures as Captures
from heretic_ds.directions.base import Found as Found
from heretic_ds.directions.base import Method
from heretic_ds.directions.base import Request as Request
from heretic_ds.directions.means import MeanDifference, MedianOfMeans
from heretic_ds.directions.som import SelfOrganisingMap

METHODS: dict[str, type[Method]] = {each.name: each for each in (MeanDifference, MedianOfMeans, SelfOrganisingMap)}
"""By name."""
