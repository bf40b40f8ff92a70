"""Runs side by side: the numbers, the table, CSV and Markdown."""

import csv
import io
import json
import math
import re
import statistics

import matplotlib.pyplot as plt
import pytest
from bodies import body
from rich.console import Console

from cakeflow.cli.command_line import run_command as main
from cakeflow.export.card import escape
from cakeflow.journal.ledger import Ledger
from cakeflow.report import RunFolder, compare_runs, plot_runs, runs_table, to_csv, to_markdown
from cakeflow.report.views import run_changes


def expected(folder, kind):
    """Mean and bounds of a metric of fewer than 20 records, from the lines of after.jsonl alone."""
    rates = [rate for rate in successes(folder, kind) if rate is not None]
    mean, size, z = statistics.fmean(rates), len(rates), statistics.NormalDist().inv_cdf(0.975)
    center, spread = mean + z**2 / 2 / size, z * math.sqrt(mean * (1 - mean) / size + (z / 2 / size) ** 2)
    return mean, (center - spread) / (1 + z**2 / size), (center + spread) / (1 + z**2 / size)


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
            result = [float(row[metric + bound]) for bound in ("", "_low", "_high")]
            assert result == pytest.approx(expected(folder, kind), abs=1e-6)
        assert (row["edits"], row["model"], row["protocol"]) == (str(size), "lab/tiny-model", "clean-v1")
        assert row["method"] == "Scores + Jacobian + NullSpace(LeastSquares)"
        assert float(row["seconds_per_edit"]) == pytest.approx(24.5 / size)
        assert float(row["peak_GiB"]) == 0.5
        assert (float(row["margin"]), row["margin_low"]) == (1.5, "")
        mean, low, high = expected(folder, "paraphrase")
        shown = f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        assert shown in printed
        assert escape(shown) in (tmp_path / "runs.md").read_text()
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
    result = [second - first for first, second in pairs if first is not None]
    mean, more = statistics.fmean(result), [*result, 1, -1]
    center, half = statistics.fmean(more), 1.959964 * statistics.pstdev(more) / math.sqrt(len(more))
    names = ("delta_generalization", "delta_generalization_low", "delta_generalization_high")
    assert mean < 0
    assert [float(rows[1][name]) for name in names] == pytest.approx([mean, center - half, center + half], abs=1e-6)
    assert float(rows[1]["delta_specificity"]) == 0
    assert [rows[0][names[0]], rows[2][names[0]]] == ["", ""]
    assert f"\N{MINUS SIGN}{-100 * mean:.1f} [\N{MINUS SIGN}{100 * (half - center):.1f}, " in printed
    assert "paired by record" in printed


def test_runs_of_different_protocols_are_not_passed_off_as_comparable(folders, make_run, capsys):
    make_run("third")
    info = json.loads((folders[0] / "run.json").read_text())
    (folders[0] / "run.json").write_text(json.dumps(info | {"protocol": "other-v2"}))
    main(["compare", str(folders[0]), str(folders[0].parent / "third")])
    printed = capsys.readouterr().out
    assert "different protocols" in printed
    assert "\N{GREEK CAPITAL LETTER DELTA}" not in printed


def with_info(folder, **changes):
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | changes))
    return info


def test_settings_that_differ_are_listed_and_no_others(make_run):
    one, two = make_run("one"), make_run("two", size=7)
    info = with_info(two, versions={"cakeflow": "0.2.0", "torch": "2.13.0"})
    texts = ["x" * 500, "x" * 499 + "y"]
    for folder, text, scores in ((one, texts[0], "0.1"), (two, texts[1], "0.2")):
        weighter = f"Scores(scores={{5: {scores}}}, tau=0.1)"
        with_info(folder, settings=info["settings"] | {"weighter": weighter, "contexts": text})
    with_info(two, model=info["model"] | {"fingerprint_before": "cd34"})
    first, second = compare_runs([RunFolder.read(one), RunFolder.read(two)])
    names = [name for name in first if name.startswith(("settings.", "model.", "data", "batch", "versions"))]
    assert names == ["model.fingerprint_before", "settings.weighter", "settings.contexts", "versions"]
    assert (first["settings.weighter"], second["settings.weighter"]) == tuple(
        f"Scores(scores={{5: {scores}}}, tau=0.1)" for scores in ("0.1", "0.2")
    )
    assert (first["versions"], second["versions"]) == ("cakeflow 0.1.0", "cakeflow 0.2.0")
    assert first["settings.contexts"] != second["settings.contexts"]
    assert all(len(row["settings.contexts"]) < 100 for row in (first, second))
    assert not {"settings.weighter", "versions"} & set(compare_runs([RunFolder.read(one), RunFolder.read(one)])[0])


def test_settings_of_another_class_are_no_difference_and_the_class_is_named(make_run):
    folders = [make_run("one"), make_run("two"), make_run("memory")]
    info = json.loads((folders[2] / "run.json").read_text())
    (folders[2] / "run.json").write_text(json.dumps(info | {"settings": {"layer": 3}}))
    path = folders[2] / "journal" / "ledger.jsonl"
    path.unlink()
    Ledger(path).append(body("run", method={"class_path": "some.plugin.SideMemory", "init_args": {}}))
    rows = compare_runs([RunFolder.read(folder) for folder in folders])
    assert not [name for row in rows for name in row if name.startswith("settings.")]
    assert [row["method"] for row in rows][1:] == [rows[0]["method"], "SideMemory"]


def test_a_table_names_runs_by_what_tells_them_apart(make_run):
    rows = compare_runs([RunFolder.read(make_run(name)) for name in ("a/cake", "b/cake")])
    console = Console(width=80, file=io.StringIO())
    console.print(runs_table(rows))
    text = console.file.getvalue()
    assert "a/cake" in text
    assert "generalization_exact " in text
    assert str(rows[0]["run"]) not in text


def test_data_and_batch_size_are_compared_where_a_ledger_has_them(make_run):
    folders = [make_run("one"), make_run("two")]
    path = folders[1] / "journal" / "ledger.jsonl"
    path.unlink()
    Ledger(path).append(body("run", data="1" * 64, batch_size=5))
    rows = compare_runs([RunFolder.read(folder) for folder in folders])
    assert [row["data (SHA-256)"] for row in rows] == ["0" * 64, "1" * 64]
    assert [row["batch size"] for row in rows] == ["2", "5"]
    path.unlink()
    rows = compare_runs([RunFolder.read(folder) for folder in folders])
    assert rows[1]["batch size"] == "\N{EN DASH}"


def test_a_rollback_has_a_row(folders, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    main(["compare", *map(str, folders)])
    assert "taken back" not in capsys.readouterr().out
    ledger = Ledger(folders[1] / "journal" / "ledger.jsonl")
    ledger.append(body("evaluation"))
    ledger.append(body("rollback", batches=[0, 1]))
    rows = main(["compare", *map(str, folders)])
    assert rows[0]["taken back"] == ""
    assert rows[1]["taken back"].startswith("batches 0 to 1 taken back by ann@host on 20")
    assert rows[1]["taken back"].endswith("(the metrics were measured before that)")
    assert "batches 0 to 1 taken back by ann@host" in capsys.readouterr().out


def test_runs_are_drawn_with_intervals_and_their_curves(folders):
    runs = [RunFolder.read(folder) for folder in folders]
    first, *others = plot_runs(runs).figure.axes
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["first", "second"]
    names = [text.get_text() for text in first.get_yticklabels()]
    for container, run in zip(first.containers, runs, strict=True):
        after = run_changes(run)["generalization"].after
        place = names.index("generalization")
        assert container.lines[0].get_xdata()[place] == pytest.approx(100 * after.mean)
        segment = container.lines[2][0].get_segments()[place]
        assert segment[:, 0] == pytest.approx([100 * after.low, 100 * after.high])
    assert [ax.get_ylabel() for ax in others] == ["ability acc", "neutral perplexity"]
    lines = [text.get_text() for text in others[0].get_legend().get_texts()]
    assert lines == ["first: cloze", "second: cloze"]
    plt.close("all")


@pytest.mark.parametrize("name", ["a.png", "deep/a.svg"])
def test_the_plot_is_written(name, folders, tmp_path, capsys):
    main(["compare", *map(str, folders), "--plot", str(tmp_path / name)])
    assert (tmp_path / name).read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    assert not plt.get_fignums()


def test_a_plot_without_a_format_is_refused_first(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path), "--plot", "a.txt"])
    assert "'a.txt' names no image; end it in .png, .svg or .pdf" in " ".join(capsys.readouterr().err.split())


def test_runs_that_were_not_evaluated_are_drawn(make_run):
    folder = make_run("$bad$")
    for name in ("before.jsonl", "after.jsonl", "metrics.csv"):
        (folder / name).unlink()
    with_info(folder, metrics={})
    ax = plot_runs([RunFolder.read(folder), RunFolder.read(make_run("other"))])
    ax.figure.canvas.draw()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["$bad$", "other"]
    plt.close("all")


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
