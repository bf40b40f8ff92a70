"""Runs side by side: the numbers, the table, CSV and Markdown."""

import csv
import json
import math
import re
import statistics

import pytest

from cakeflow.cli.command_line import run_command as main
from cakeflow.report import RunFolder, compare_runs, to_csv, to_markdown


def expected(folder, kind):
    """Mean and bounds of a metric, from the lines of after.jsonl alone."""
    rates = []
    for line in (folder / "after.jsonl").read_text().splitlines():
        asked = [prompt for prompt in json.loads(line)["prompts"] if prompt["kind"] == kind]
        judged = [prompt["expected_logprob"] > prompt["rival_logprob"] for prompt in asked if prompt["rival_logprob"]]
        rates += [sum(judged) / len(judged)] if judged else []
    mean, half = statistics.fmean(rates), 1.959964 * statistics.stdev(rates) / math.sqrt(len(rates))
    return mean, mean - half, mean + half


@pytest.fixture
def folders(make_run):
    return [make_run("first"), make_run("second", size=7)]


def test_the_command_shows_and_writes_the_runs(folders, tmp_path, capsys):
    files = ["--csv", str(tmp_path / "runs.csv"), "--markdown", str(tmp_path / "runs.md")]
    main(["compare", *map(str, folders), *files])
    printed = capsys.readouterr().out
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [str(folder) for folder in folders]
    for row, folder, size in zip(rows, folders, (12, 7), strict=True):
        for metric, kind in (
            ("efficacy", "rewrite"),
            ("generalization", "paraphrase"),
            ("specificity", "neighborhood"),
        ):
            found = [float(row[metric + bound]) for bound in ("", "_low", "_high")]
            assert found == pytest.approx(expected(folder, kind), abs=1e-6)
        assert (row["edits"], row["model"], row["protocol"]) == (str(size), "lab/tiny-model", "clean-v1")
        assert row["method"] == "Scores + Jacobian + NullSpace(LeastSquares)"
        assert float(row["seconds_per_edit"]) == pytest.approx(24.5 / size)
        assert float(row["peak_GiB"]) == 0.5
        assert (float(row["margin"]), row["margin_low"]) == (1.5, "")
        mean, low, _ = expected(folder, "paraphrase")
        shown = f"{100 * mean:.1f} ± {100 * (mean - low):.1f}"
        assert shown in printed
        assert shown in (tmp_path / "runs.md").read_text()
    assert "different protocols" not in printed


def successes(folder, kind):
    """Share of each record's prompts of a kind that succeed; None where none can be judged."""
    for line in (folder / "after.jsonl").read_text().splitlines():
        asked = [p for p in json.loads(line)["prompts"] if p["kind"] == kind and p["rival_logprob"]]
        yield statistics.fmean(p["expected_logprob"] > p["rival_logprob"] for p in asked) if asked else None


def test_runs_of_the_same_records_are_compared_record_by_record(make_run, tmp_path, capsys):
    def worse(record):
        for prompt in record["prompts"]:
            if record["index"] % 3 == 0 and prompt["kind"] != "neighborhood":
                prompt["expected_logprob"] = -9.0
        return record

    folders = [make_run("one"), make_run("two", change=worse), make_run("three", size=5)]
    main(["compare", *map(str, folders), "--csv", str(tmp_path / "runs.csv")])
    printed = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    pairs = zip(*(successes(folder, "paraphrase") for folder in folders[:2]), strict=True)
    found = [second - first for first, second in pairs if first is not None]
    half = 1.959964 * statistics.stdev(found) / math.sqrt(len(found))
    mean = statistics.fmean(found)
    names = ("delta_generalization", "delta_generalization_low", "delta_generalization_high")
    assert mean < 0
    assert [float(rows[1][name]) for name in names] == pytest.approx([mean, mean - half, mean + half], abs=1e-6)
    assert float(rows[1]["delta_specificity"]) == 0
    assert [rows[0][names[0]], rows[2][names[0]]] == ["", ""]
    assert f"\N{MINUS SIGN}{-100 * mean:.1f} ± {100 * half:.1f}" in printed
    assert "paired by record" in printed


def test_runs_of_different_protocols_are_not_passed_off_as_comparable(folders, make_run, capsys):
    make_run("third")
    info = json.loads((folders[0] / "run.json").read_text())
    (folders[0] / "run.json").write_text(json.dumps(info | {"protocol": "other-v2"}))
    main(["compare", str(folders[0]), str(folders[0].parent / "third")])
    printed = capsys.readouterr().out
    assert "different protocols" in printed
    assert "\N{GREEK CAPITAL LETTER DELTA}" not in printed


def test_a_run_that_tells_less_has_gaps(folders):
    info = json.loads((folders[1] / "run.json").read_text())
    (folders[1] / "run.json").write_text(json.dumps({name: info[name] for name in ("model", "settings", "versions")}))
    (folders[1] / "after.jsonl").unlink()
    full, poor = compare_runs([RunFolder.read(folder) for folder in folders])
    assert list(full) == list(poor)
    assert math.isnan(poor["efficacy"].mean)
    assert math.isnan(poor["seconds per edit"])
    assert poor["edits"] == 7


def test_markup_in_a_name_is_shown_as_it_is(make_run):
    folder = make_run("[red]a|b")
    table = to_markdown(compare_runs([RunFolder.read(folder)]))
    assert r"\[red\]a\|b" in table.splitlines()[0]


def test_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(tmp_path)])
    assert stop.value.code == 2
    assert "no run.json" in " ".join(capsys.readouterr().err.split())


def test_no_text_is_a_formula_in_a_spreadsheet_or_markup_in_markdown():
    wide = "\N{FULLWIDTH EQUALS SIGN}"
    bad = [
        "=HYPERLINK(1)",
        "+1",
        "-x",
        " @SUM(1)",
        "\t=1",
        "\N{FULLWIDTH EQUALS SIGN}1",
        "a\x1b[2J",
        "x|y\n# z",
        "<b>*c*",
    ]
    row = {"run": "first", **dict.fromkeys(bad[:-1], 1.5)} | {"=1+1": "=2+2", "-2": -2.0}
    cells = [cell for line in csv.reader(to_csv([{**row, "run": text} for text in bad]).splitlines()) for cell in line]
    for cell in cells:
        assert cell.isprintable()
        assert cell in ("1.5", "-2.0") or cell.lstrip()[:1] not in ("=", "+", "-", "@", wide)
    assert {"'=2+2", "'=HYPERLINK(1)", "-2.0"} <= set(cells)
    lines = to_markdown([{**row, "run": text} for text in bad]).splitlines()
    assert len(lines) == len(row) + 1
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(bad) + 2}
    assert all(line.isprintable() for line in lines)
    assert r"\<b\>\*c\*" in lines[0]
