"""Final scores: what an export is worth beside its original, prompt by prompt, with intervals."""
