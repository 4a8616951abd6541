"""What others made: their files are read here, within bounds and without tracebacks; their texts are made fit to print;
their programs run here, within limits."""
