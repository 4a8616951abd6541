"""Edits carried out on a model: in its weights, in its outputs, in the outputs of its experts."""
