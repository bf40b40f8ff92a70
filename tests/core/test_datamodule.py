"""The data module: batches, limits and order."""

import copy
import json

import datasets
import lightning as L
import numpy as np
import pytest
from tiny_runs import module_of

from cakeflow.core.datamodule import EditDataModule
from cakeflow.data import builtin_facts
from cakeflow.data.request import EditRequest
from cakeflow.errors import ConfigError, RequestError
from cakeflow.forward.tokens import EditBatch, TextBatch

REQUESTS = [EditRequest("{} is number", f"Item {i}", str(i)) for i in range(10)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cached")


def numbers(loader):
    return [[int(request.target_new) for request in batch.requests] for batch in loader]


def batches_of(lm, *args, **kwargs):
    """The edit batches that a module gets."""
    data = EditDataModule(*args, **kwargs)
    data.attach(module_of(lm), edit=True, evaluate=False)
    return data.train_dataloader()


def test_it_is_a_lightning_data_module():
    assert isinstance(EditDataModule(REQUESTS), L.LightningDataModule)


@pytest.mark.parametrize(
    ("batch_size", "expected"),
    [(None, [10]), (1, [1] * 10), (4, [4, 4, 2]), (10, [10]), (99, [10])],
)
def test_edit_batches_keep_the_order(lm, batch_size, expected):
    batches = list(batches_of(lm, REQUESTS, batch_size))
    assert [len(batch) for batch in batches] == expected
    assert [number for batch in numbers(batches) for number in batch] == list(range(10))
    assert all(type(batch) is TextBatch for batch in batches)


def test_a_batch_size_from_an_array_is_a_plain_number():
    data = EditDataModule(REQUESTS, np.int64(4), limit=np.int32(6))
    assert (type(data.batch_size), data.batch_size, len(data.requests)) == (int, 4, 6)


def test_batches_need_a_model():
    """A Trainer that got an empty loader would edit nothing and say nothing."""
    with pytest.raises(ConfigError, match=r"need a model.*datamodule=data"):
        EditDataModule(REQUESTS).train_dataloader()


def test_validation_covers_the_same_records_in_its_own_batches(lm):
    data = EditDataModule(REQUESTS, batch_size=2, limit=7, eval_batch_size=3)
    assert numbers(data.val_dataloader()) == [[0, 1, 2], [3, 4, 5], [6]]
    assert all(type(batch) is EditBatch for batch in data.val_dataloader())
    assert numbers(batches_of(lm, REQUESTS, batch_size=2, limit=7)) == [[0, 1], [2, 3], [4, 5], [6]]


def test_another_module_gets_its_own_batches(lm):
    data, first, second = EditDataModule(REQUESTS), module_of(lm), module_of(copy.deepcopy(lm))
    for module in (first, first, second):
        data.attach(module, edit=True, evaluate=True)
    (batch,) = data.train_dataloader()
    data.attach(second, edit=True, evaluate=True)
    assert next(iter(data.train_dataloader())) is batch
    data.attach(first, edit=True, evaluate=True)
    assert next(iter(data.train_dataloader())) is not batch


@pytest.mark.parametrize(("limit", "expected"), [(None, 10), (1, 1), (4, 4), (99, 10)])
def test_limit(limit, expected):
    data = EditDataModule(REQUESTS, limit=limit)
    assert data.requests == REQUESTS[:expected]
    assert data.batch_size == expected


def test_default_is_the_built_in_data():
    assert EditDataModule(limit=40).requests == builtin_facts()[:40]


def test_shuffling_is_seeded_and_comes_before_the_limit():
    shuffled = EditDataModule(REQUESTS, shuffle_seed=3).requests
    assert shuffled == EditDataModule(REQUESTS, shuffle_seed=3).requests
    assert shuffled != REQUESTS
    assert shuffled != EditDataModule(REQUESTS, shuffle_seed=4).requests
    assert sorted(shuffled, key=REQUESTS.index) == REQUESTS
    assert EditDataModule(REQUESTS, shuffle_seed=3, limit=4).requests == shuffled[:4]
    assert [request.subject for request in REQUESTS] == [f"Item {i}" for i in range(10)]  # the caller's list is left


def test_epochs_repeat_the_order(lm):
    loader = batches_of(lm, REQUESTS, 3, shuffle_seed=1)
    assert numbers(loader) == numbers(loader)


@pytest.mark.parametrize("name", ["batch_size", "limit", "eval_batch_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_below_one(name, value):
    with pytest.raises(ConfigError, match=rf"data\.{name} must be a whole number of at least 1, got {value}"):
        EditDataModule(REQUESTS, **{name: value})


def test_bad_requests_are_refused_at_once():
    with pytest.raises(RequestError, match="entry 10, prompt"):
        EditDataModule([*REQUESTS, EditRequest("none", "a", "b")], limit=2)


def test_only_what_is_edited_must_agree():
    clash = EditRequest("{} is number", "Item 3", "33")
    assert EditDataModule([*REQUESTS, clash], limit=10).requests == REQUESTS
    with pytest.raises(RequestError, match=r"entry 10, .*contradicts entry 3"):
        EditDataModule([*REQUESTS, clash])
    assert EditDataModule([clash, *REQUESTS], conflicts="drop", limit=4).requests == [clash, *REQUESTS[:3]]


def test_order_and_split_reach_the_reader(lm, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for split, count in (("train", 10), ("test", 4)):
        lines = [json.dumps({**request.to_dict(), "case_id": i}) for i, request in enumerate(REQUESTS[:count])]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    assert numbers(batches_of(lm, folder, split="test", order=[3, 0], batch_size=1)) == [[3], [0]]
    with pytest.raises(ConfigError, match="no record has 9"):
        EditDataModule(folder, split="test", order=[9])


def test_missing_source():
    with pytest.raises(ConfigError, match="no file"):
        EditDataModule("no-such-file.json")


def test_how_subjects_and_targets_are_read_is_a_setting():
    record = {"src": "Is Ann the Ann of Rome?", "subject": "Ann", "answers": ["yes"], "alt": "no"}
    (request,) = EditDataModule([record]).requests
    assert (request.prompt, request.target_new) == ("Is {} the Ann of Rome?", "yes")
    (request,) = EditDataModule([record], occurrence="last", zsre_target="alt").requests
    assert (request.prompt, request.target_new) == ("Is Ann the {} of Rome?", "no")


def test_a_stream_may_replace_its_own_facts_but_not_in_one_batch():
    facts = [EditRequest("{} is in", "Lund", name) for name in ("Peru", "Chile", "Cuba")]
    assert EditDataModule(facts, 1, conflicts="keep").requests == facts
    with pytest.raises(RequestError, match="entry 1, target_new = 'Chile': contradicts entry 0"):
        EditDataModule(facts, 2, conflicts="keep")
    with pytest.raises(RequestError, match="contradicts entry 0"):
        EditDataModule(facts, 1)
