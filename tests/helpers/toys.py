"""The toy experiments of scripts/, which are not part of the package, as modules."""

import sys

from tests.helpers.paths import ROOT

sys.path.append(str(ROOT / "scripts"))

import toy
from toys import adapters, alignment, angles, linear, phase_portrait, relu, risk

__all__ = ["adapters", "alignment", "angles", "linear", "phase_portrait", "relu", "risk", "toy"]


def runs(rows, *fields):
    """{values of the fields: rows of that run}."""
    found = {}
    for row in rows:
        found.setdefault(tuple(getattr(row, field) for field in fields), []).append(row)
    return found
