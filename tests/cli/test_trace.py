"""``cakeflow trace`` and ``cakeflow facts``, run in this process on a tiny model in a folder."""

import json

import pytest

from cakeflow.cli.command_line import run_command as main
from cakeflow.data.sources import read_entries
from cakeflow.forward.generation import continuations
from cakeflow.tracing import Trace, read_facts


@pytest.fixture
def folder(lm, workplace):
    """A model, and five facts of which it states at least one."""
    names = ("Ann", "Bob", "Lund", "Zoe", "Rome")
    said = continuations(lm, [f"The sea of {name} is" for name in names], 8)
    facts = [
        {"template": "The sea of {} is", "subject": name, "attribute": text.split()[0]}
        for name, text in zip(names, said, strict=True)
    ]
    (workplace / "known.json").write_text(json.dumps(facts))
    return workplace


def test_trace(folder, capsys):
    words = ["trace", "--model", str(folder / "model"), "--data", str(folder / "known.json"), "--out", "found"]
    result = main([*words, "--trace.draws", "2", "--trace.tokens", "all"])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"knows {len(result.effects)} of 5 facts" in printed
    assert f"{result.scores[2]:.4f}" in printed
    again = Trace.load(folder / "found" / "trace.json")
    assert again.scores == result.scores
    for name in ("map", "weights"):
        assert (folder / "found" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "proposed" not in printed


def test_a_trace_of_windows_proposes_layers(folder, capsys):
    words = ["trace", "--model", str(folder / "model"), "--data", str(folder / "known.json")]
    main([*words, "--trace.draws", "1", "--trace.role", "mlp_out", "--trace.window", "3"])
    assert "proposed layers [" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--data", "nothing.json"], "nothing.json"),
        (["--layers", "[99]"], "99"),
        (["--model", "nothing"], "nothing"),
        (["--limit", "-1"], "limit must be a whole number of at least 1, got -1"),
    ],
)
def test_bad_input_ends_with_a_message(folder, capsys, change, words):
    with pytest.raises(SystemExit) as stop:
        main(["trace", "--model", str(folder / "model"), "--data", str(folder / "known.json"), *change])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mine/stated.json", "stated.jsonl"])
def test_facts_are_written_as_a_trace_reads_them(folder, capsys, name):
    asked = json.loads((folder / "known.json").read_text())
    (folder / "asked.json").write_text(json.dumps([*asked, {**asked[0], "attribute": "qqqq"}]))
    model = ["--model", str(folder / "model")]
    known = main(["facts", *model, "--data", str(folder / "asked.json"), "--out", name])
    assert f"states {len(known)} of 6 facts by itself; written to {name}" in " ".join(capsys.readouterr().out.split())
    entries = read_entries(folder / name)
    assert [entry["known_id"] for entry in entries] == list(range(len(known)))
    assert {"subject", "template", "attribute", "prompt"} <= set(entries[0])
    assert read_facts(folder / name) == [each.fact for each in known]
    traces = [
        main(["trace", *model, "--data", str(folder / data), "--trace.draws", "2", "--out", f"found-{number}"])
        for number, data in enumerate(["asked.json", name])
    ]
    assert (traces[0].clean == traces[1].clean).all()
    assert traces[0].scores == traces[1].scores


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--out", "."], "is a folder"),
        (["--limit", "0"], "at least 1"),
        (["--data", "nothing.json"], "nothing.json"),
        (["--split", "train"], "no splits"),
        (["--prompts", "['{} is']"], "prompts and subjects"),
        (["--prompts", "[is]", "--subjects", "[Ann]"], "exactly one {}"),
    ],
)
def test_bad_input_of_facts_is_refused_before_a_model_loads(folder, capsys, monkeypatch, change, words):
    monkeypatch.setattr("cakeflow.cli.trace.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as stop:
        main(["facts", *change])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_facts_of_which_none_is_stated_leave_no_file(folder, capsys):
    words = ["--prompts", "['{} is']", "--subjects", "[Ann, Bob]"]  # a random model names nothing
    with pytest.raises(SystemExit):
        main(["facts", "--model", str(folder / "model"), *words, "--out", "stated.json"])
    assert "knows none" in capsys.readouterr().err
    assert not (folder / "stated.json").exists()


def test_no_known_fact(folder, capsys):
    (folder / "known.json").write_text(json.dumps([{"template": "{} is", "subject": "Ann", "attribute": "qqqq"}]))
    with pytest.raises(SystemExit):
        main(["trace", "--model", str(folder / "model"), "--data", str(folder / "known.json")])
    assert "knows none" in capsys.readouterr().err


def test_a_layer_out_of_range_is_refused_before_anything_is_asked(folder, capsys, monkeypatch):
    monkeypatch.setattr("cakeflow.cli.trace.known_rows", lambda *_: pytest.fail("asked"))
    with pytest.raises(SystemExit):
        main(["trace", "--model", str(folder / "model"), "--data", str(folder / "known.json"), "--layers", "[99]"])
    assert "layer 99 is not in the model" in capsys.readouterr().err
