"""Bodies of format 1, which numbered weights by layer, as bodies of format 2."""

import json
from pathlib import Path

import pytest
from bodies import EXAMPLES

from cakeflow.journal.format1 import upgraded
from cakeflow.journal.ledger import Ledger, bodies, canonical
from cakeflow.journal.schema import BODIES, BatchBody, RollbackBody

RUN = Path(__file__).parents[1] / "fixtures/format1/run"
PLACE = "transformer.h.{}.mlp.c_proj.weight".format


def test_layers_of_format_1_become_places():
    path = RUN / "journal/ledger.jsonl"
    lines = [json.loads(line)["body"] for line in path.read_text().splitlines()]
    entries = Ledger(path, PLACE).entries
    for entry in entries[3:5]:
        raw = lines[entry.number]
        assert isinstance(entry.body, BatchBody)
        assert [change.place for change in entry.body.changes] == [PLACE(layer) for layer in raw["order"]]
        for layer, change in zip(raw["order"], entry.body.changes, strict=True):
            assert (change.kind, change.prefix) == ("WeightChange", str(layer))
            assert {name: getattr(change, name) for name in ("numbers", "before", "after")} == raw["layers"][str(layer)]
        rest = entry.body.to_dict()
        del rest["changes"]
        assert canonical(rest) == canonical({name: raw[name] for name in raw if name not in ("layers", "order")})
    (rollback,) = bodies(entries, RollbackBody)
    assert rollback.places == {PLACE(int(layer)): hashed for layer, hashed in lines[7]["layers"].items()}


@pytest.mark.parametrize("kind", BODIES)
def test_bodies_of_format_2_need_no_upgrade(kind):
    assert upgraded(kind, EXAMPLES[kind], PLACE) == EXAMPLES[kind]
