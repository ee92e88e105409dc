"""What a comparison shows: the family that p values are corrected for."""

import pytest

from lora_one.reports.compare import Run
from lora_one.reports.findings import findings


def test_methods_without_a_result_are_corrected_for():
    """Those of the file, which may all have failed; a folder of runs has no such list."""
    runs = [
        Run(method, "final", {}, seed, None, test_loss=loss + 0.01 * seed + noise)
        for method, loss, noises in (("base", 2.0, (0, 0, 0)), ("other", 1.9, (0, 0.001, 0.003)))
        for seed, noise in enumerate(noises)
    ]
    runs.append(Run("broken", "final", {}, 0, None, "the loss became nan"))
    alone, among = (findings(runs, "base", [], family=family)[0]["verdicts"][0] for family in (0, 4))
    assert alone["p"] < 0.01 and among["p"] == pytest.approx(4 * alone["p"])
    assert "after Holm" in among["sentence"] and "after Holm" not in alone["sentence"]
