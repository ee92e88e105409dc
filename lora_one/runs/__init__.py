"""Whole runs: one experiment from top to bottom, the command line, plans, sweeps and comparisons."""
