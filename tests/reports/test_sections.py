"""The sections of a report: published values stand beside the measured ones."""

from lora_one.reports.compare import RATE
from lora_one.reports.pages import overview
from lora_one.reports.sections import sections
from tests.helpers.comparison_records import record

PUBLISHED = {
    "source": "a paper, Table 1",
    "values": {"accuracy": {"rsLoRA": 71.5, "LoRA": "70.1 +- 0.3", "CorDA": "72.0"}},
}


def test_published_values_are_beside_the_measured_ones():
    """Also that of a method that was not run."""
    found = record()
    found["comparison"]["published"] = PUBLISHED
    section = sections(found)[0]
    place = section.table[0].index("accuracy (%)")
    assert section.table[0][place + 1] == "published"
    cells = {row[0]: row[place : place + 2] for row in section.table[1:]}
    assert cells["rsLoRA"][1] == "71.5" and cells["LoRA"][1] == "70.1 +- 0.3" and cells["rsLoRA"][0] != "71.5"
    assert cells["CorDA"] == ["-", "72.0"] and cells["LoRA-One, scaled AdamW"][1] == "-"
    assert "Published: a paper, Table 1" in section.text
    assert len({len(row) for row in section.table}) == 1, "every row has every column"


def with_one_not_run():
    found = record("Two sets: one")
    found["comparison"]["evaluations"]["MT-Bench"] = {"benchmark": None, "not_run": "no judge"}
    found["comparison"]["published"] = {"source": "a paper", "values": {"MT-Bench": {"LoRA": 5.1}}}
    return found


def test_an_evaluation_that_is_not_run_has_a_column_that_says_so():
    """Beside the published values; no other table, and no verdict, names it."""
    first, *others = sections(with_one_not_run())
    place = first.table[0].index("MT-Bench")
    cells = {row[0]: row[place : place + 2] for row in first.table}
    assert cells["method"] == ["MT-Bench", "published"]
    assert cells["LoRA"] == ["not run yet", "5.1"] and cells["rsLoRA"] == ["not run yet", "-"]
    assert first.items[-1] == "MT-Bench: not run yet: no judge"
    assert not any("MT-Bench" in cell for section in others for row in section.table for cell in row)
    assert len({len(row) for row in first.table}) == 1, "every row has every column"


def test_a_task_without_runs_is_a_table_and_a_column_of_the_overview():
    absent = with_one_not_run()
    absent["comparison"]["evaluations"].pop("accuracy")
    absent |= {"runs": [], "findings": [], "rows": [{"method": "LoRA", "note": ""}]}
    (section,) = sections(absent)
    assert section.table == [["method", "seeds", "MT-Bench", "published"], ["LoRA", "-", "not run yet", "5.1"]]
    assert section.text == ["Published: a paper"]
    cells = {row[0]: row[1:] for row in overview({"one": absent, "two": record("Two sets: two")}).table}
    assert cells["method"] == ["one: MT-Bench", "two: accuracy (%)"]
    assert cells["LoRA"][0] == "not run yet [5.1]" and cells["rsLoRA"][0] == "-"


def test_without_published_values_there_is_no_column():
    section = sections(record())[0]
    assert "published" not in section.table[0] and not any("ublished" in text for text in section.text)


def test_the_overview_has_published_values_in_brackets():
    records = {name: record(f"Two sets: {name}") for name in ("one", "two")}
    records["one"]["comparison"]["published"] = PUBLISHED
    section = overview(records)
    cells = {row[0]: row[1:] for row in section.table}
    assert cells["LoRA"][0].endswith("(worse) [70.1 +- 0.3]") and cells["LoRA"][1].endswith("(worse)")
    assert cells["CorDA"] == ["- [72.0]", "-"]
    assert section.text[1:] == ["In brackets, published: a paper, Table 1"]


def over_the_epochs(found):
    return next(section for section in sections(found) if section.title == "Over the epochs")


def test_validation_accuracy_is_shown_over_the_epochs_unless_kept_epochs_were_evaluated():
    found = record()
    section = over_the_epochs(found)
    assert section.table[0][-1] == "validation accuracy (%)"
    assert [row[1:] for row in section.table if row[0] == "rsLoRA"] == [
        ["0", "0.6000", "50.0"],
        ["1", "0.5500", "60.0"],
        ["2", "0.5333", "70.0"],
    ]
    for run in found["runs"]:
        if run["stage"] == "final":
            run["epoch_scores"] = {"accuracy": {"1": 0.4 if run["seed"] == 11 else 0.5}}
    kept = over_the_epochs(found)
    assert kept.table[0][-1] == "accuracy (%)"
    losses, scores = zip(*(row[2:] for row in kept.table if row[0] == "rsLoRA"), strict=True)
    assert losses == ("0.6000", "0.5500", "0.5333") and scores[:2] == ("-", "48.0"), "four seeds at 50, one at 40"
    assert abs(float(scores[2]) - 70.4) < 0.2, "the end of the training is the score of the run"


def test_an_epoch_that_one_seed_does_not_have_is_left_out():
    found = record()
    next(run for run in found["runs"] if run["stage"] == "final" and run["method"] == "rsLoRA")["history"] = ()
    assert [row for row in over_the_epochs(found).table if row[0] == "rsLoRA"] == []


def section_of(found, title):
    return next(section for section in sections(found) if section.title == title)


def test_a_rate_that_failed_is_still_one_that_was_tried():
    """The chosen one is then not at an end, in the table and in the figure alike."""
    found = record()
    for run in found["runs"]:
        if (run["method"], run["stage"], run["point"][RATE]) == ("rsLoRA", "tuning", 1e-2):
            run["error"] = "the loss became nan"
    rows = [row for row in section_of(found, "Learning rates").table if row[0] == "rsLoRA"]
    assert [row[1] for row in rows] == ["0.0001", "0.001"] and rows[1][3] == "chosen"


def test_every_point_of_a_grid_is_shown_with_all_its_values():
    found = record()
    for run in found["runs"]:
        run["point"]["optimizer"] = "adamw"
    extra = [run for run in found["runs"] if (run["method"], run["stage"]) == ("rsLoRA", "tuning")]
    found["runs"] += [run | {"point": run["point"] | {"optimizer": "muon"}, "validation_loss": 0.1} for run in extra]
    for row in found["rows"]:
        row["optimizer"] = "adamw"
    rows = [row for row in section_of(found, "Learning rates").table if row[0] == "rsLoRA"]
    assert [row[2] for row in rows].count("muon") == 3 and len(rows) == 6
    assert [row[1:3] for row in rows if row[-1]] == [["0.001", "adamw"]]


def test_a_grid_without_learning_rates_is_shown():
    found = record()
    for run in found["runs"]:
        run["point"] = {"peft.lora_r": 8 * round(1e4 * run["point"][RATE])}
    for row in found["rows"]:
        row |= {"peft.lora_r": 80}
    table = section_of(found, "Points of the grid").table
    assert table[0][1] == "peft.lora_r" and [row[1] for row in table if row[0] == "rsLoRA"] == ["8", "80", "800"]


def test_a_point_is_marked_as_chosen_also_if_its_runs_failed():
    found = record()
    for run in found["runs"]:
        if (run["method"], run["stage"]) == ("rsLoRA", "final"):
            run["error"] = "the loss became nan"
    rows = [row for row in section_of(found, "Learning rates").table if row[0] == "rsLoRA"]
    assert [row[1] for row in rows if row[-1]] == ["0.001"]


def test_a_key_of_one_method_s_own_grid_is_none_of_the_others():
    found = record()
    for run in found["runs"]:
        if run["method"] == "LoRA":
            run["point"]["peft.lora_alpha"] = 16
    table = section_of(found, "Results").table
    place = table[0].index("lora_alpha")
    next(row for row in found["rows"] if row["method"] == "LoRA")["peft.lora_alpha"] = 16
    table = section_of(found, "Results").table
    assert {row[0]: row[place] for row in table[1:]}["LoRA"] == "16"
    assert {row[0]: row[place] for row in table[1:]}["rsLoRA"] == "-"


def test_a_verdict_on_a_loss_says_which_side_is_better():
    texts = {section.title: section.text for section in sections(record()) if section.title.startswith("Verdicts")}
    assert texts == {"Verdicts: accuracy": [], "Verdicts: test loss": ["Lower is better."]}


def test_a_chosen_null_is_not_nothing_chosen():
    found = record()
    for run in found["runs"]:
        run["point"]["model.max_steps"] = None
    for row in found["rows"]:
        row["model.max_steps"] = None
    table = section_of(found, "Results").table
    assert [row[table[0].index("max_steps")] for row in table[1:] if row[0] == "rsLoRA"] == ["null"]


def test_what_distinguishes_the_methods_and_each_evaluation_is_shown():
    found = record()
    found["comparison"] |= {"methods": {"LoRA": ["init=lora", "model.weight_decay=0.3"]}, "common": ["model=tiny"]}
    found["comparison"]["evaluations"]["accuracy"] = {"benchmark": "glue", "options": ["--dataset=rte"]}
    settings = section_of(found, "Settings of each method")
    assert ["LoRA", "init=lora model.weight_decay=0.3"] in settings.table
    assert settings.text[0] == "Overrides of all: model=tiny."
    origin = dict(section_of(found, "Origin").table)
    assert origin["evaluation accuracy"] == "accuracy of glue --dataset=rte"


def test_a_failed_evaluation_does_not_hide_the_counts_of_the_others():
    found = record()
    run = next(run for run in found["runs"] if (run["method"], run["stage"]) == ("rsLoRA", "final"))
    run["scores"] = {"accuracy": {"error": "broken"}}
    (row,) = [row for row in section_of(found, "Unparsed and cut answers").table if row[0] == "rsLoRA"]
    assert row[3:] == ["1.0", "0.0"]


def test_a_part_without_the_baseline_says_that_nothing_is_tested():
    found = record(baseline=None)
    found["comparison"] |= {"left_out": ["rsLoRA"], "tuning_seeds": [1], "seeds": [11]}
    text = " ".join(section_of(found, "Results").text)
    assert "part of the comparison: rsLoRA. Without a baseline nothing is tested." in text and "p values" not in text


def test_a_grid_of_lists_is_shown():
    found = record()
    for run in found["runs"]:
        run["point"]["peft.lora_target_modules"] = ["q_proj"]
    assert section_of(found, "Learning rates").table and "[q_proj]" in section_of(found, "Runs").table[1]


def test_test_examples_that_were_seen_are_not_called_unseen():
    found = record()
    found["test"]["counts"]["seen"] = 3
    found["comparison"]["overlap"] = "a reason"
    text = " ".join(section_of(found, "Results").text)
    assert "neither" not in text and "also used for training or choosing" in text


def test_a_baseline_without_one_figure_is_said():
    found = record()
    found["findings"][0] |= {"verdicts": []}
    titles = [section_of(found, f"Verdicts: {part['figure']}") for part in found["findings"]]
    assert titles[0].text == ["Not tested: no other method has a result."] and titles[1].items
    for run in found["runs"]:
        run["scores"] = {} if run["method"] == "rsLoRA" else run["scores"]
    assert section_of(found, "Verdicts: accuracy").text == ["Not tested: rsLoRA has no result."]


def test_the_protocol_names_the_rounds_of_further_rates():
    found = record()
    assert "further rates" not in " ".join(section_of(found, "Results").text)
    found["comparison"]["refine"] = 2
    assert "then 2 rounds of two further rates, beyond the best one" in " ".join(section_of(found, "Results").text)


def test_times_of_a_machine_with_other_work_rank_no_method():
    found = record()
    assert section_of(found, "Cost").drawings and "cannot" not in section_of(found, "Cost").text[0]
    run = next(run for run in found["runs"] if run["stage"] == "final")
    run["train_seconds"] *= 2
    section = section_of(found, "Cost")
    assert not section.drawings and "differ by up to 2.0 x" in section.text[0]


def test_the_protocol_says_what_is_not_covered():
    found = record()
    text = section_of(found, "Results").text[0]
    assert "the noise of choosing them is not part" in text and "questions this is not checked" in text
    found["comparison"]["left_out"] = ["A", "B"]
    assert "p values are corrected for them: A, B." in section_of(found, "Results").text[0]


def test_a_baseline_without_a_result_is_said():
    found = record()
    found["findings"] = []
    assert section_of(found, "Verdicts").text == ["Not tested: no run of the baseline rsLoRA has a result."]


def test_each_run_has_its_score_with_wilson_s_interval():
    """8 of 10: 49.0 to 94.3 %, as by hand in the tests of Wilson; no interval of Matthews' coefficient and pass@1."""
    found = record()
    assert "In brackets" not in " ".join(section_of(found, "Runs").text), "records of earlier versions have no field"
    scores = [run["scores"]["accuracy"] for run in found["runs"] if run["stage"] == "final" and run["scores"]]
    scores[0] |= {"value": 0.8, "answers": 10, "field": "correct"}
    scores[1] |= {"value": 0.8, "answers": 10, "field": None, "metric": "matthews"}
    scores[2] |= {"value": 0.8, "answers": 10, "field": "correct", "metric": "pass@1"}
    section = section_of(found, "Runs")
    place = section.table[0].index("accuracy (%)")
    cells = [row[place] for row in section.table[1:] if row[1] == "final"]
    assert cells[:3] == ["80.0 [49.0, 94.3]", "80.0", "80.0"] and "Wilson" in section.text[0]
    assert {row[place] for row in section.table[1:] if row[1] == "tuning"} == {"-"}
    assert len({len(row) for row in section.table}) == 1, "every row has every column"
