"""Starting the ranks of a job with DeepSpeed's launcher, and ending every one of them, however the job ends.

`python -m heretic_ds.launching -n 2 <model> ...`, which `launch/run.sh` calls; Hydra's launcher plugin uses it too.
"""
