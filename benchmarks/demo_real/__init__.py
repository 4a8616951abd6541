"""The example on a real model: how its prompts were chosen, and how its results in ``docs/example/`` are written."""
