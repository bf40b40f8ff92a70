"""``cakeflow edit``: sentences in, a verdict out."""

import json

import pytest
from tiny_runs import content

from cakeflow.cli.command_line import run_command as main
from cakeflow.cli.edit import run_edit
from cakeflow.errors import ConfigError
from cakeflow.journal.ledger import bodies, read_entries
from cakeflow.journal.schema import BatchBody, RunBody

PAIRS = ["LeBron James plays the sport of", "tennis", "Google was founded by", "Newton"]


def test_from_the_sentence_to_the_verdict(method, workplace, capsys):
    done = main(["edit", *PAIRS, *method, "--run_dir", "runs/one"])
    printed = capsys.readouterr().out
    (step,) = done.journal
    assert [(r.prompt, r.subject, r.target_new) for r in step.requests] == [
        ("{} plays the sport of", "LeBron James", "tennis"),
        ("{} was founded by", "Google", "Newton"),
    ]
    assert {probe.kind for probe in step.requests[0].probes} == {"paraphrase", "neighborhood"}
    assert "Facts to edit" in printed
    assert "facts learned" in printed
    assert (workplace / "runs/one/run.json").exists()


@pytest.mark.checks
def test_a_dry_run_stores_nothing_and_says_the_verdict(method, workplace, capsys):
    done = main(["edit", *PAIRS[:2], *method, "--dry_run"])
    assert "of 1 facts learned" in capsys.readouterr().out
    assert len(done.journal) == 0
    assert not (workplace / "runs").exists()


def test_a_second_edit_goes_on_from_the_first(method, workplace):
    first = main(["edit", *PAIRS[:2], *method, "--run_dir", "runs/one"])
    before = content(workplace / "runs/one")
    second = main(["edit", *PAIRS[2:], *method, "--run_dir", "runs/two", "--from", "runs/one"])
    assert content(workplace / "runs/one") == before
    assert [step.requests[0].subject for step in second.journal] == ["LeBron James", "Google"]
    assert second.journal[0].after == first.journal[0].after
    entries = read_entries(workplace / "runs/two/journal/ledger.jsonl")
    assert [entry.kind for entry in entries if entry.kind in ("batch", "run", "end")] == [
        "batch",
        "run",
        "batch",
        "end",
    ]
    third = main(["replay", "runs/two"])
    assert third.edits == 2


def test_a_dry_run_on_top_of_a_run_leaves_that_as_it_is(method, workplace):
    main(["edit", *PAIRS[:2], *method, "--run_dir", "runs/one"])
    before = content(workplace / "runs/one")
    done = main(["edit", *PAIRS[2:], *method, "--from", "runs/one", "--dry_run"])
    assert content(workplace / "runs/one") == before
    assert [step.requests[0].subject for step in done.journal] == ["LeBron James"]


def test_options_of_fit_are_refused_where_nothing_is_edited(method, workplace, capsys):
    for words in (["--from", "runs/one"], ["--strict"]):
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", "--model", "model", "--model.layers", "[1]", "--data", "builtin", *words])
        assert stop.value.code == 2
        assert "--from and --strict belong to fit" in capsys.readouterr().err


def test_fit_goes_on_from_a_run_too_by_its_method_unless_one_is_named(method, workplace):
    facts = [{"prompt": "{} is in", "subject": name, "target_new": "Peru"} for name in ("Lund", "Oslo")]
    for name, fact in zip(("a", "b"), facts, strict=True):
        (workplace / f"{name}.json").write_text(json.dumps([fact]))
    words = ["--model", "model", "--method", method[3], "--model.layers", "[1]"]
    main(["fit", *words, "--data", "a.json", "--run_dir", "runs/one"])
    for name, named in (("two", words), ("three", []), ("four", ["--model", str(workplace / "model")])):
        done = main(["fit", *named, "--data", "b.json", "--run_dir", f"runs/{name}", "--from=runs/one"])
        assert [step.requests[0].subject for step in done.journal] == ["Lund", "Oslo"]
    one, two, three, four = (
        list(read_entries(workplace / "runs" / name / "journal/ledger.jsonl"))
        for name in ("one", "two", "three", "four")
    )
    assert bodies(one, RunBody)[-1].method == bodies(three, RunBody)[-1].method == bodies(four, RunBody)[-1].method
    assert [each.changes for each in bodies(two, BatchBody)] == [each.changes for each in bodies(three, BatchBody)]


def test_a_budget_takes_the_edit_back(method, workplace, capsys):
    (workplace / "budget.yaml").write_text("minimum: {efficacy_exact: 1.5}")
    with pytest.raises(SystemExit) as stop:
        main(["edit", *PAIRS[:2], *method, "--budget", "budget.yaml"])
    assert stop.value.code == 2
    assert "efficacy_exact is" in capsys.readouterr().err


@pytest.mark.checks
def test_strict_fails_unless_everything_was_learned(method):
    with pytest.raises(SystemExit) as stop:
        main(["edit", *PAIRS[:2], *method, "--strict", "--dry_run"])
    assert stop.value.code == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"texts": ["Ann is"]}, "'Ann is' is alone"),
        ({"texts": []}, "give sentences and their new answers"),
        ({"texts": PAIRS[:2], "file": "x.json"}, "one of them"),
        ({"texts": ["it is", "x"]}, "no subject can be guessed; name it: --subject NAME"),
        ({"texts": ["it is " * 1000, "x"]}, r"^entry 0, prompt = '[^']{,80}\.\.\.: no subject can be guessed; .{,30}$"),
        ({"texts": PAIRS, "subject": "Ann"}, "1 subjects for 2 facts"),
        ({"texts": PAIRS[:2], "dry_run": True, "run_dir": "runs/x"}, "--dry_run stores nothing"),
    ],
)
def test_bad_words_are_named(arguments, words):
    with pytest.raises(ConfigError, match=words):
        run_edit(**arguments)


def test_subjects_by_name_and_facts_in_a_file(method, workplace):
    facts = [
        {"prompt": "Ann Lee is from", "target_new": "Peru"},
        {"prompt": "{} is", "subject": "Bo", "target_new": "tall"},
    ]
    (workplace / "facts.json").write_text(json.dumps(facts))
    done = main(["edit", "--file", "facts.json", *method, "--run_dir", "runs/one"])
    requests = done.journal[0].requests
    assert [(request.prompt, request.subject) for request in requests] == [("{} is from", "Ann Lee"), ("{} is", "Bo")]
