"""How far apart two kinds of prompts lie at one layer, and what the direction between them is worth there.

Shapes: N prompts of both kinds, n of one kind, D width. All is computed in float64, from residuals as directions are
made of them. A number that is not defined (the cosine with a zero vector, the spread of one prompt) is None.

The target prompts' residuals have the mean t, the baseline prompts' the mean b, and r = t - b is the layer's direction
before it is normalised: the difference of means of Arditi et al. 2024 (arXiv 2406.11717, section 2.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

_ROUNDING = 1e-12
"""Relative length below which a difference of means, which are sums of many numbers, is taken for none."""
_SAME = 1e-13
"""Squared distance of two points, relative to their own squares, below which they are taken for one: about the rounding
of the products that it is computed from, and below that of residuals in float32."""
_STEPS, _CLOSE = 200, 1e-10
"""Most steps towards a geometric median, and the change of the weights below which it is found."""


@dataclass(frozen=True)
class LayerGeometry:
    """One layer's numbers, see the module's and the functions' docstrings. A star marks geometric medians."""

    target_norm: float
    """|t|, length of the target prompts' mean residual."""
    baseline_norm: float
    """|b|, of the baseline prompts'."""
    direction_norm: float
    """|r|, length of the difference of the means."""
    target_median_norm: float
    """|t*|, length of the target prompts' geometric median."""
    baseline_median_norm: float
    """|b*|."""
    median_direction_norm: float
    """|r*|, r* = t* - b*."""
    cos_means: float | None
    """cos(t, b)."""
    cos_target_direction: float | None
    """cos(t, r)."""
    cos_baseline_direction: float | None
    """cos(b, r); what ``direction.orthogonalize`` makes 0."""
    cos_medians: float | None
    """cos(t*, b*)."""
    cos_target_median_direction: float | None
    """cos(t*, r*)."""
    cos_baseline_median_direction: float | None
    """cos(b*, r*)."""
    cos_next: float | None
    """cos(r, r of the next layer); None for the last one."""
    separability: float | None
    """d' of :func:`separation`, in standard deviations."""
    accuracy: float | None
    """Share of prompts on their own side of the midpoint, of :func:`separation`."""
    silhouette: float | None
    """Mean silhouette coefficient of :func:`silhouette`, from -1 to 1."""

    def to_dict(self) -> dict[str, float | None]:
        """Numbers by name, seven significant digits."""
        return {name: None if number is None else float(f"{number:.7g}") for name, number in asdict(self).items()}

    @classmethod
    def from_dict(cls, numbers: dict[str, Any]) -> LayerGeometry:
        """The inverse of :meth:`to_dict`; other keys are left out."""
        return cls(**{name: numbers[name] for name in cls.__dataclass_fields__})


def measure(layers: Iterable[tuple[Tensor, Tensor]]) -> list[LayerGeometry]:
    """The numbers of consecutive layers, each given by the residuals of target [n, D] and baseline prompts [n', D].

    Of one layer at a time no more is held than its residuals.
    """
    target_means, baseline_means, others = [], [], []
    for target_ND, baseline_ND in layers:
        target_ND, baseline_ND = target_ND.double(), baseline_ND.double()
        target_means.append(target_ND.mean(0))
        baseline_means.append(baseline_ND.mean(0))
        others.append(_of_residuals(target_ND, baseline_ND))
    means = of_means(torch.stack(target_means), torch.stack(baseline_means))
    return [LayerGeometry.from_dict({**each, **more}) for each, more in zip(means, others, strict=True)]


def of_means(target_LD: Tensor, baseline_LD: Tensor) -> list[dict[str, float | None]]:
    """What of :class:`LayerGeometry` follows from the means [L+1, D] alone, by name, for every layer."""
    found: list[dict[str, float | None]] = []
    directions = [difference(*means) for means in zip(target_LD.double(), baseline_LD.double(), strict=True)]
    for entry, direction_D in enumerate(directions):
        target_D, baseline_D = target_LD[entry].double(), baseline_LD[entry].double()
        later = directions[entry + 1 : entry + 2]
        found.append(
            {
                "target_norm": target_D.norm().item(),
                "baseline_norm": baseline_D.norm().item(),
                "direction_norm": direction_D.norm().item(),
                "cos_means": cosine(target_D, baseline_D),
                "cos_target_direction": cosine(target_D, direction_D),
                "cos_baseline_direction": cosine(baseline_D, direction_D),
                "cos_next": cosine(direction_D, later[0]) if later else None,
            }
        )
    return found


def _of_residuals(target_ND: Tensor, baseline_ND: Tensor) -> dict[str, float | None]:
    """What takes single prompts' residuals."""
    target_D, baseline_D = geometric_median(target_ND), geometric_median(baseline_ND)
    direction_D = difference(target_D, baseline_D)
    separability, accuracy = separation(target_ND, baseline_ND)
    is_target_N = torch.arange(len(target_ND) + len(baseline_ND)) < len(target_ND)
    return {
        "target_median_norm": target_D.norm().item(),
        "baseline_median_norm": baseline_D.norm().item(),
        "median_direction_norm": direction_D.norm().item(),
        "cos_medians": cosine(target_D, baseline_D),
        "cos_target_median_direction": cosine(target_D, direction_D),
        "cos_baseline_median_direction": cosine(baseline_D, direction_D),
        "separability": separability,
        "accuracy": accuracy,
        "silhouette": silhouette(distances(torch.cat([target_ND, baseline_ND])), is_target_N),
    }


def difference(target_D: Tensor, baseline_D: Tensor) -> Tensor:
    """t - b [D]; exactly zero where it is no more than the rounding of means."""
    direction_D = target_D - baseline_D
    scale = max(target_D.norm().item(), baseline_D.norm().item())
    return torch.zeros_like(direction_D) if direction_D.norm().item() <= _ROUNDING * scale else direction_D


def cosine(one_D: Tensor, other_D: Tensor) -> float | None:
    """cos(x, y) = x·y / (|x| |y|), within [-1, 1]; None where one of them is zero."""
    one, other = one_D.norm().item(), other_D.norm().item()
    if one == 0.0 or other == 0.0:
        return None
    return max(-1.0, min(1.0, (one_D / one).dot(other_D / other).item()))


def separation(target_ND: Tensor, baseline_ND: Tensor) -> tuple[float | None, float | None]:
    """How well the direction tells the kinds of prompts apart: (d', accuracy), each prompt judged without itself.

    With t_i the mean of the target prompts but x_i, a target prompt's place on the direction is its signed distance
    from the plane halfway between the means,

        s_i = (x_i - (t_i + b) / 2) · (t_i - b) / |t_i - b|,

    and a baseline prompt's likewise with its own mean b_i. A prompt that takes part in its own mean would be on the
    right side in any stream of more dimensions than prompts. Then d' = (mean of target s - mean of baseline s) divided
    by the root of the mean of both variances, with n - 1 (Green and Swets 1966; the square is twice Fisher's
    criterion), and accuracy is the share of target prompts with s > 0 and baseline prompts with s < 0, where 0 counts
    half. None with fewer than two prompts of a kind and where there is no direction, d' also where nothing spreads.
    """
    target_D, baseline_D = target_ND.mean(0), baseline_ND.mean(0)
    if min(len(target_ND), len(baseline_ND)) < 2 or not difference(target_D, baseline_D).any():
        return None, None
    # Towards the target, for both kinds.
    target_N = _places_without_oneself(target_ND, baseline_D)
    baseline_N = -_places_without_oneself(baseline_ND, target_D)
    right_N = torch.cat([target_N, -baseline_N])
    accuracy = (right_N.gt(0).double() + right_N.eq(0).double() / 2).mean().item()
    spread = math.sqrt((target_N.var().item() + baseline_N.var().item()) / 2)
    scale = right_N.abs().max().item()
    if spread <= _ROUNDING * scale or spread == 0.0:
        return None, accuracy
    return (target_N.mean() - baseline_N.mean()).item() / spread, accuracy


def _places_without_oneself(own_ND: Tensor, other_D: Tensor) -> Tensor:
    """s [n] of the prompts of one kind, positive on their own side; 0 where the means agree."""
    n, mean_D = len(own_ND), own_ND.mean(0)
    others_ND = mean_D + (mean_D - own_ND) / (n - 1)  # the mean without each row
    along_ND, middle_ND = others_ND - other_D, (others_ND + other_D) / 2
    length_N = along_ND.norm(dim=-1)
    place_N = ((own_ND - middle_ND) * along_ND).sum(-1) / length_N
    return torch.where(length_N > _ROUNDING * others_ND.norm(dim=-1), place_N, torch.zeros_like(place_N))


def distances(point_ND: Tensor) -> Tensor:
    """Euclidean distances [N, N] of points [N, D], by |x - y|² = |x|² + |y|² - 2 x·y around their mean.

    O(N² D) time, O(N²) memory. Points closer than the rounding of these products are at distance 0.
    """
    centred_ND = point_ND - point_ND.mean(0)
    product_NN = centred_ND @ centred_ND.T
    square_N = product_NN.diagonal()
    scale_NN = square_N[:, None] + square_N[None, :]
    squared_NN = scale_NN - 2 * product_NN
    squared_NN = torch.where(squared_NN > _SAME * scale_NN, squared_NN, torch.zeros_like(squared_NN))
    return squared_NN.fill_diagonal_(0.0).sqrt()


def silhouette(distance_NN: Tensor, is_target_N: Tensor) -> float | None:
    """Mean silhouette coefficient of the two kinds of prompts (Rousseeuw 1987), by distances [N, N].

    For a prompt with mean distance a to the others of its kind, and b to those of the other kind, it is
    (b - a) / max(a, b): near 1 where kinds are tight and apart, near 0 where they overlap. It is 0 for the only prompt
    of a kind, and where a = b = 0. None where a kind has no prompt, where there are but two prompts, and where all
    prompts lie at one point.
    """
    kinds = [is_target_N, ~is_target_N]
    if len(is_target_N) < 3 or not all(kind.any() for kind in kinds) or not distance_NN.any():
        return None
    found = []
    for own_N, other_N in (kinds, reversed(kinds)):
        others = int(own_N.sum()) - 1
        if others == 0:
            found.append(torch.zeros(1, dtype=torch.float64))
            continue
        within_n = distance_NN[own_N][:, own_N].sum(-1) / others
        between_n = distance_NN[own_N][:, other_N].mean(-1)
        largest_n = torch.maximum(within_n, between_n)
        found.append(torch.where(largest_n > 0, (between_n - within_n) / largest_n, torch.zeros_like(largest_n)))
    return torch.cat(found).mean().item()


def geometric_median(point_ND: Tensor) -> Tensor:
    """The point [D] with the least sum of distances to n points: a centre that outliers hardly move.

    Weiszfeld's iteration y <- Σ x_i / |x_i - y| / Σ 1 / |x_i - y|, from the mean, with distances bounded below so that
    y may come to lie on a point. It works on the weights of the points, of whose products [n, n] all distances follow:
    O(n²) a step, however wide the stream.
    """
    n, mean_D = len(point_ND), point_ND.mean(0)
    centred_ND = point_ND - mean_D
    product_NN = centred_ND @ centred_ND.T
    square_N = product_NN.diagonal()
    least = 1e-9 * square_N.max().sqrt()
    if least == 0.0:
        return mean_D
    weight_N = torch.full((n,), 1 / n, dtype=point_ND.dtype)
    for _ in range(_STEPS):
        along_N = product_NN @ weight_N
        squared_N = square_N - 2 * along_N + weight_N.dot(along_N)
        pull_N = 1 / squared_N.clamp_min(0).sqrt().clamp_min(least)
        before_N, weight_N = weight_N, pull_N / pull_N.sum()
        if (weight_N - before_N).abs().max() < _CLOSE:
            break
    return mean_D + weight_N @ centred_ND
