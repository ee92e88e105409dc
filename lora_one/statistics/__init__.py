"""Tests and intervals of a comparison, in two layers that are never mixed: training seeds, and test questions."""
