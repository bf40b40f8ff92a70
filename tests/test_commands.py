"""Commands beside Lightning's, run in this process on a tiny model in a folder."""

import json

import pytest

from cakeflow.cli import main
from cakeflow.generation import continuations
from cakeflow.tracing import Trace


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
    found = main([*words, "--trace.draws", "2", "--trace.tokens", "all"])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"knows {len(found.effects)} of 5 facts" in printed
    assert f"{found.scores[2]:.4f}" in printed
    again = Trace.load(folder / "found" / "trace.json")
    assert again.scores == found.scores
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
    ],
)
def test_bad_input_ends_with_a_message(folder, capsys, change, words):
    with pytest.raises(SystemExit) as stop:
        main(["trace", "--model", str(folder / "model"), "--data", str(folder / "known.json"), *change])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_no_known_fact(folder, capsys):
    (folder / "known.json").write_text(json.dumps([{"template": "{} is", "subject": "Ann", "attribute": "qqqq"}]))
    with pytest.raises(SystemExit):
        main(["trace", "--model", str(folder / "model"), "--data", str(folder / "known.json")])
    assert "knows none" in capsys.readouterr().err


def test_a_layer_out_of_range_is_refused_before_anything_is_asked(folder, capsys, monkeypatch):
    monkeypatch.setattr("cakeflow.commands.known_rows", lambda *_: pytest.fail("asked"))
    with pytest.raises(SystemExit):
        main(["trace", "--model", str(folder / "model"), "--data", str(folder / "known.json"), "--layers", "[99]"])
    assert "layer 99 is not in the model" in capsys.readouterr().err
