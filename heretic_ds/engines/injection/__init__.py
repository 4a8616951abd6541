"""DeepSpeed's injected inference kernels, made to fit the models that transformers builds.

What is wrong with them as they come, and what is done about it here, is told in ``docs/kernel_injection.md``.
"""
