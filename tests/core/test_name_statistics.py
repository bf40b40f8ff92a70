"""Second moments of keys at names: those of the last tokens, whatever is padded, in a place of their own."""

import json

import pytest
import torch

from cakeflow import Statistics
from cakeflow.core.statistics import points_of
from cakeflow.errors import ConfigError, StatisticsError
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture

SITES = {layer: Site(layer, "mlp_out") for layer in (1, 2)}
NAMES = ["Ann", "Newport News", "the sea", "Danielle Darrieux of old", "Lyon"]


@pytest.fixture
def people(tmp_path):
    path = tmp_path / "names.jsonl"
    path.write_text("".join(json.dumps({"text": name}) + "\n" for name in NAMES))
    return Statistics(path, at="names", batch_tokens=20)


def test_keys_at_names_are_those_of_their_last_tokens(tiny, people, tmp_path):
    total = 0
    for name in NAMES:
        with capture(tiny, [SITES[2]], side="in") as inputs, torch.no_grad():
            tiny.model(input_ids=tiny.tokenizer(name, return_tensors="pt")["input_ids"], use_cache=False)
        total = total + torch.outer(inputs[SITES[2]][0, -1], inputs[SITES[2]][0, -1]) / len(NAMES)
    moment = people.collect(tiny, [SITES[2]], tmp_path / "kept")[SITES[2]].moment
    torch.testing.assert_close(moment, total.double(), rtol=0, atol=1e-10)
    again = Statistics(people.source, at="names", batch_tokens=1).collect(tiny, [SITES[2]], tmp_path / "other")[
        SITES[2]
    ]
    torch.testing.assert_close(again.moment, moment, rtol=0, atol=1e-12)
    assert points_of(again)[-1].tokens == len(NAMES)


def test_names_have_a_place_of_their_own_in_the_cache(lm, people, tmp_path):
    first = people.collect(lm, [SITES[1]], tmp_path)[SITES[1]].moment
    count = []
    lm.model.register_forward_pre_hook(lambda *_: count.append(1))
    assert torch.equal(people.collect(lm, [SITES[1]], tmp_path)[SITES[1]].moment, first)
    assert count == []
    builtin = Statistics(at="names")
    assert len(builtin.windows(lm, 64)) == 512
    assert not torch.equal(builtin.collect(lm, [SITES[1]], tmp_path)[SITES[1]].moment, first)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


def test_names_that_cannot_be_read(lm, tmp_path):
    with pytest.raises(ConfigError, match=r"statistics\.at must be one of tokens, names"):
        Statistics(at="name")
    (tmp_path / "one.txt").write_text("the sea was calm " * 100)
    with pytest.raises(ConfigError, match=r"a name of \d+ tokens, and the model reads \d+; .* each document is a name"):
        Statistics(tmp_path / "one.txt", at="names").windows(lm, 64)
    (tmp_path / "none.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(StatisticsError, match="has no name"):
        Statistics(tmp_path / "none.jsonl", at="names").windows(lm, 64)
