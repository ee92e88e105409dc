"""lora-one-report: the report of a comparison's folder again, with its tasks, or of a folder with runs."""

import doctest
import json

from lora_one.runs import report_command
from tests.helpers.comparison_records import record


def write(folder, name, title, date):
    (folder / name).mkdir(parents=True)
    (folder / name / "comparison.json").write_text(json.dumps(record(title) | {"date": date}))


def test_tasks_have_their_names_and_the_order_in_which_they_ran(tmp_path, capsys):
    write(tmp_path, "zeta-2", "A study: of sets: Zeta, 2", "2026-01-01")
    write(tmp_path, "alpha", "A study: of sets: Alpha", "2026-01-02")
    assert report_command.main([str(tmp_path)]) == 0
    assert "report.html" in capsys.readouterr().out
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# A study: of sets\n")
    header = next(line for line in text.splitlines() if line.startswith("| method"))
    assert header.index("Zeta, 2: accuracy") < header.index("Alpha: accuracy")


def test_comparisons_of_one_title_are_all_reported_with_their_own_figures(tmp_path):
    for name, title in (("one", "Inits"), ("two", "Inits"), ("three", "Inits!")):
        write(tmp_path, name, title, "2026-01-01")
    assert report_command.main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert all(f"Inits ({name}): accuracy" in text for name in ("one", "two")) and "Inits! (three): accuracy" in text
    figures = [file.name for file in (tmp_path / "figures").glob("*.svg")]
    assert len(figures) % 3 == 0 and all(any(name in file for file in figures) for name in ("one", "two", "three"))


def test_a_comparison_beside_those_of_tasks_is_refused(tmp_path, capsys):
    write(tmp_path, "old", "Old", "2026-01-01")
    write(tmp_path, "old/sst-2", "New: SST-2", "2026-01-02")
    assert report_command.main([str(tmp_path / "old")]) == 2
    assert "contains a comparison, and others in subfolders, such as sst-2" in capsys.readouterr().err


def test_comparisons_at_different_depths_are_refused(tmp_path, capsys):
    write(tmp_path, "one", "One", "2026-01-01")
    write(tmp_path, "two/sst-2", "Two: SST-2", "2026-01-02")
    assert report_command.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"contains several comparisons: pass the folder of one, of {tmp_path / 'one'}, {tmp_path / 'two'}\n" in said
    write(tmp_path, "one/further/task", "Another", "2026-01-03")
    assert report_command.comparisons(tmp_path / "one").keys() == {""}, "what lies deeper does not hide it"


def test_one_comparison_has_its_own_title_and_may_be_written_elsewhere(tmp_path):
    write(tmp_path, "one", "A study: of sets", "2026-01-01")
    assert report_command.main([str(tmp_path / "one"), "--output", str(tmp_path / "there")]) == 0
    assert (tmp_path / "there" / "report.md").read_text().startswith("# A study: of sets\n")


def test_a_baseline_of_a_comparison_and_a_folder_without_results_are_refused(tmp_path, capsys):
    write(tmp_path, "one", "One", "2026-01-01")
    assert report_command.main([str(tmp_path / "one"), "--baseline", "LoRA"]) == 2
    assert "the comparison's file names its baseline" in capsys.readouterr().err
    assert report_command.main([str(tmp_path / "none")]) == 2
    assert "contains no run" in capsys.readouterr().err


def test_doctests():
    assert doctest.testmod(report_command).failed == 0
