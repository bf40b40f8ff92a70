"""``cakeflow benchmark``, in this process on a tiny model: plan, rows, page, and the paper's suite."""

import json
from functools import partial
from pathlib import Path

import pytest
from conftest import random_model
from tiny_suites import NUMBERS, write_suite

from cakeflow.cli.command_line import run_command as main
from cakeflow.core.run import run_fit
from cakeflow.storage.yaml_text import dump_yaml

SMALL = ["benchmark", "--suite", "mine.yaml", "--out", "out"]


@pytest.fixture
def write(tmp_path):
    """Writes a suite with changes into the current folder."""
    return partial(write_suite, tmp_path)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def test_a_suite_ends_with_its_page_and_goes_on(write, capsys):
    write()
    rows = main([*SMALL, "--methods", "[single]"])
    printed = " ".join(capsys.readouterr().out.split())
    assert [row.arm for row in rows] == ["own/4/seed0/memit_seq", "own/4/seed0/single"]
    assert "2 of 2 runs to measure: " in printed
    assert "own/4/seed0/single: efficacy" in printed
    assert "written to out/suite.html and out/suite.md" in printed
    html = Path("out/suite.html").read_text()
    assert "cakeflow benchmark --suite mine.yaml --out out --methods &#39;[single]&#39;" in html
    assert main(SMALL)[:2] == [rows[0], main(SMALL)[1]]
    assert "1 of 3 runs to measure: " in " ".join(capsys.readouterr().out.split())


def test_commands_of_the_page_import_what_the_suite_needs(write, monkeypatch):
    Path("mylab.py").write_text(
        "from dataclasses import dataclass\nfrom cakeflow.allocators import Sequential\n\n\n"
        "@dataclass(frozen=True)\nclass Mine(Sequential):\n    pass\n"
    )
    monkeypatch.syspath_prepend(".")
    write(methods={"memit_seq": None, "mine": {"method": "memit_seq", "allocator": {"class_path": "mylab.Mine"}}})
    rows = main([*SMALL, "--import", "mylab"])
    assert [row.fault for row in rows] == ["", ""]
    assert "    cakeflow benchmark --import mylab --suite mine.yaml --out out\n" in Path("out/suite.md").read_text()
    assert "cakeflow reproduce --import mylab out/runs/own/4/seed0/mine" in Path("out/suite.html").read_text()


def test_a_plan_measures_nothing(write, capsys, monkeypatch):
    write()
    monkeypatch.setattr("cakeflow.suites.rows.run_fit", None)
    assert main([*SMALL, "--plan_only"]) == []
    printed = capsys.readouterr().out
    assert "own, 4, seed 0 │ ultraedit" in printed
    assert "3 of 3 runs to measure" in printed
    assert not Path("out").exists()


def test_files_are_data_sets_beside_those_of_the_suite(write, capsys):
    write()
    Path("more.json").write_text(Path("facts.json").read_text())
    rows = main([*SMALL, "--data", "[more.json]", "--methods", "[single]", "--sizes", "[2]"])
    assert [row.arm for row in rows] == [f"{data}/2/seed0/{name}" for data in ("own", "more") for name in
                                         ("memit_seq", "single")]  # fmt: skip
    assert rows[0].settings["facts"] == rows[2].settings["facts"]
    assert "## more, 2 facts" in Path("out/suite.md").read_text()
    capsys.readouterr()


def test_general_ability_is_on_the_page(write):
    write()
    Path("tasks").mkdir()
    item = '{"prompt": "The sea is", "choices": ["blue", "loud"], "answer": 0}\n'
    Path("tasks/words.jsonl").write_text(item)
    rows = main([*SMALL, "--ability", "tasks", "--methods", "[single]"])
    assert all(row.metrics["ability/words/acc"] in (0.0, 1.0) for row in rows)
    assert "| ability/words/acc |" in Path("out/suite.md").read_text().replace("\\", "")
    assert "--ability tasks" in Path("out/suite.html").read_text()


def test_an_interrupt_leaves_rows_and_the_command_goes_on(write, capsys, monkeypatch):
    write()
    runs = []

    again = []

    def interrupted(*words, **options):
        runs.append(words)
        again.append(options["goes_on"])
        if len(runs) == 2:
            raise KeyboardInterrupt
        return run_fit(*words, **options)

    with monkeypatch.context() as patch:
        patch.setattr("cakeflow.suites.rows.run_fit", interrupted)
        with pytest.raises(SystemExit) as stop:
            main(SMALL)
    assert stop.value.code == 130
    assert [json.loads(line)["arm"] for line in Path("out/rows.jsonl").read_text().splitlines()] == [
        "own/4/seed0/memit_seq"
    ]
    assert not Path("out/suite.html").exists()
    assert len(main(SMALL)) == 3
    assert again[0](Path("any")) == "cakeflow benchmark --suite mine.yaml --out out"
    assert "2 of 3 runs to measure" in " ".join(capsys.readouterr().out.split())


def test_the_paper_suite_runs_on_a_tiny_model(write, lm, capsys):
    write()
    config = {**lm.model.config.to_dict(), "n_positions": 512}  # questions of a choice are long
    wide = random_model(config.pop("model_type"), lm.tokenizer, **config)
    wide.model.save_pretrained("wide")
    lm.tokenizer.save_pretrained("wide")
    words = ["benchmark", "--suite", "paper", "--model", "wide", "--model_config", "numbers.yaml", "--sizes", "[3]"]
    rows = main([*words, "--methods", "[alphaedit, retrieval, ultraedit]", "--out", "out"])
    assert len(rows) == 4 * 3  # seeds
    assert [row.fault for row in rows] == [""] * 12
    assert {row.protocol.partition("-")[0] for row in rows} == {"wild_official"}
    assert all("retention" in " ".join(row.metrics) for row in rows)
    assert Path("out/suite.html").stat().st_size > 10_000
    assert dump_yaml(NUMBERS) == Path("numbers.yaml").read_text()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--suite", "smal"], "no suite config 'smal'; did you mean 'small'"),
        (["--suite", "mine.yaml", "--methods", "[memitt]"], "has no arm 'memitt'"),
        (
            ["--suite", "mine.yaml", "--methods", "single"],
            "methods must be a list or null, got 'single'; write [single]",
        ),
        (["--suite", "mine.yaml", "--data", "[nothing.json]"], "nothing.json"),
        (["--suite", "mine.yaml", "--sizes", "[99]"], "99 are to be"),
        (["--suite", "mine.yaml", "--model", "nowhere", "--model_config", "numbers.yaml"], "model 'nowhere'"),
    ],
)
def test_bad_input_ends_with_a_message(write, capsys, words, reason):
    write()
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", *words, "--out", "out"])
    assert stop.value.code == 2
    assert reason in " ".join(capsys.readouterr().err.split())
    assert not Path("out/rows.jsonl").exists()


def test_a_suite_that_changed_is_refused_with_the_remedy(write, capsys):
    write()
    main([*SMALL, "--methods", "[single]"])
    write(batch_size=3)
    with pytest.raises(SystemExit) as stop:
        main([*SMALL, "--methods", "[single]"])
    assert stop.value.code == 2
    assert "own/4/seed0/memit_seq (batch_size) changed; go on with the suite as it was" in " ".join(
        capsys.readouterr().err.split()
    )
