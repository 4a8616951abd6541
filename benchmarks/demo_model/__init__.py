"""How the demo model in ``heretic_ds/demo/`` was made: ``python -m benchmarks.demo_model.train``."""
