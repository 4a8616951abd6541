"""Hydra's launcher `deepspeed`: every job of a sweep on ranks of its own."""
