"""Whole runs: one experiment from top to bottom, the command line around it, plans, sweeps and comparisons."""
