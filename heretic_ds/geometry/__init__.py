"""How the residuals of two kinds of prompts lie towards each other: numbers by layer, projections to a plane.

It knows no ranks, no models and no configuration; what the numbers mean is in ``docs/geometry.md``.
"""
