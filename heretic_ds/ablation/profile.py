"""The ablation weight over the layers for one component."""

from __future__ import annotations

from dataclasses import asdict, dataclass

COMPONENTS = ("attention", "mlp")
"""The two kinds of writers an edit treats separately."""


@dataclass(frozen=True)
class Profile:
    """A tent over the layers: ``max_weight`` at its position, ``min_weight`` at its foot, nothing beyond.

    Positions and distances are in layers, counted from 0; ``min_weight`` is absolute.
    """

    max_weight: float
    max_weight_position: float
    min_weight: float
    min_weight_distance: float

    def weight(self, layer: int) -> float:
        """Ablation weight of one layer; 0.0 where the layer is not edited."""
        distance = abs(layer - self.max_weight_position)
        if distance > self.min_weight_distance:
            return 0.0
        if distance == 0.0:
            return self.max_weight
        return self.max_weight + distance / self.min_weight_distance * (self.min_weight - self.max_weight)

    def to_dict(self) -> dict[str, float]:
        """The four numbers by name."""
        return asdict(self)
