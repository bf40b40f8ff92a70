"""What a trace found: scores, errors, map, files."""

import json
import math

import pytest
import torch

from cakeflow.errors import ConfigError
from cakeflow.forward.tokens import Row
from cakeflow.tracing import PLACES, Trace
from cakeflow.tracing.result import LAST_SUBJECT, Effect, TraceCache, place_of


def test_scores_errors_and_map(tmp_path):
    nan = math.nan
    effects = torch.full((3, len(PLACES), 2), nan, dtype=torch.float64)
    effects[:, LAST_SUBJECT] = torch.tensor([[0.1, 0.2], [0.3, 0.2], [0.2, 0.5]])
    effects[1, 0] = torch.tensor([0.25, 0.5])
    trace = Trace(torch.ones(3).double(), torch.zeros(3).double(), effects, {"layers": [4, 7], "noise": 1.0})
    assert trace.scores == pytest.approx({4: 0.2, 7: 0.3})
    assert trace.errors == pytest.approx({4: 0.1 / 3**0.5, 7: 0.17320508 / 3**0.5})
    assert trace.map[0].tolist() == [0.25, 0.5]
    assert trace.map[1].isnan().all()
    trace.save(tmp_path / "t.json")
    again = Trace.load(tmp_path / "t.json")
    assert torch.equal(again.effects.nan_to_num(9), effects.nan_to_num(9))
    assert again.settings == trace.settings
    assert torch.equal(again.corrupted, trace.corrupted)
    json.loads((tmp_path / "t.json").read_text(), parse_constant=lambda name: pytest.fail(name))


FACT = '{{"effects": [{{"clean": {}, "corrupted": 0, "effects": {}}}], "settings": {{"layers": [1]}}}}'
BROKEN = ["", "{}", '{"effects": 3}', "[1]", '{"effects": [], "settings": []}', "[" * 9999]


@pytest.mark.parametrize(
    "text", [*BROKEN, FACT.format(10**400, "[]"), FACT.format(1, "[[1], [1, 2]]"), FACT.format(1, "[[1]]")]
)
def test_a_file_that_is_no_trace_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=r"x\.json"):
        Trace.load(tmp_path / "x.json")


def test_of_a_ledger_what_cannot_be_read_is_traced_again(tmp_path):
    row, effect = Row((1, 2, 3), 0, 2, 0), Effect(0.5, 0.25, [None, [0.5]])
    ledger = TraceCache(tmp_path / "a.jsonl")
    ledger.add([row], [effect])
    good = (tmp_path / "a.jsonl").read_bytes()
    odd = [b"5", b"{}", b"[]", b"\xff\xfe", b'{"fact": "x", "clean": 1}', b"[" * 100_000, b"9" * 5000, b'{"fact": [1]}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*odd, good]))
    again = TraceCache(tmp_path / "a.jsonl")
    assert again[row] == effect
    odd += [good.replace(b"0.25", b"0.75"), good.replace(b'"hash"', b'"hush"'), good.partition(b', "hash"')[0] + b"}"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(odd))
    assert row not in TraceCache(tmp_path / "a.jsonl")


def test_places():
    row = Row(tuple(range(10)), subject=4, target=8, start=1)
    assert [place_of(row, token) for token in range(1, 8)] == [0, 1, 1, 2, 3, 4, 5]
    assert place_of(Row((1, 2, 3), subject=1, target=2, start=1), 1) == LAST_SUBJECT
    assert place_of(Row((1, 2, 3, 4), subject=1, target=3, start=1), 2) == 5
