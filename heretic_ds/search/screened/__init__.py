"""The screened strategy: many candidates compared without generating, of which the most promising are scored."""
