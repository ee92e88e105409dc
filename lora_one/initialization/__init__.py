"""Initialise adapters: the one-step gradient, its low-rank step, and the methods, one per file in methods/."""
