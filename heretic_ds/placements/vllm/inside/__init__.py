"""What runs in vLLM's own environment, where the package is called ``heretic_vllm``.

vLLM gets a process, and if need be an environment, of its own. There these modules, and those of ``heretic_ds`` that
they import, find PyTorch, transformers and vLLM, and none of what the job itself needs. They lie under a name of
their own, and import each other by place, since importing ``heretic_ds.placements`` would need Hydra.
"""
