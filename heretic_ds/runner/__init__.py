"""A model that runs by forward passes of this process, whatever its layout; knows no placement, job or settings."""
