"""Find and remove a behaviour's direction from a language model's weights, at any size."""

__version__ = "0.1.0"
