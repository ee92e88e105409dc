"""How adapters are initialised: the one-step gradient, its low-rank step, and one method per file in methods/."""
