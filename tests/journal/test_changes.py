"""Changes of weights and modules: applied, undone, hashed and stored."""

import copy
from dataclasses import replace

import pytest
import torch
from toy_changes import Scaled

from cakeflow import Update
from cakeflow.errors import LedgerError, NumericalError, ShapeError
from cakeflow.journal.changes import WeightChange, kind_of
from cakeflow.models import Site
from cakeflow.storage.hashing import tensor_hash

SITES = [Site(2, "mlp_out"), Site(1, "attn_out")]


def draw(lm, site, seed=0):
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = lm.oriented(site).shape
    right, left = (torch.randn(2, width, generator=generator).double() for width in (d_in, d_out))
    return WeightChange(lm.weight_name(site), Update(right, left), right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("site", SITES, ids=str)
def test_a_weight_changes_and_comes_back_bit_for_bit(tiny, dtype, site):
    tiny.model.to(dtype)
    before, change = copy.deepcopy(tiny), draw(tiny, site)
    content = change.read(tiny)
    change.apply(tiny)
    expected = before.oriented(site).double() + change.update.dense
    tolerance = {"rtol": 0, "atol": 1e-12} if dtype == torch.float64 else {}
    torch.testing.assert_close(tiny.oriented(site), expected.to(dtype), **tolerance)
    collected = tiny.oriented(site, tiny.masters.get(change.place)).double()
    torch.testing.assert_close(collected, expected, rtol=1e-6, atol=1e-6)
    assert change.hash(tiny) == tensor_hash(tiny.weight(site)) != tensor_hash(before.weight(site))
    assert (change.place in tiny.masters) == (dtype == torch.bfloat16)
    edited = change.read(tiny)
    change.undo(tiny, content)
    assert torch.equal(tiny.weight(site), before.weight(site))
    assert not tiny.masters
    change.undo(tiny, edited)  # with its master
    change.apply(tiny)
    collected = tiny.oriented(site, tiny.masters.get(change.place)).double()
    torch.testing.assert_close(collected, expected + change.update.dense, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(part, change.original(content)[name]) for name, part in change.state(before).items())


def test_small_updates_of_half_precision_are_not_lost(lm):
    lm.model.to(torch.bfloat16)
    change = draw(lm, SITES[0])
    tiny_part = WeightChange(change.place, Update(change.update.right * 1e-5, change.update.left), change.keys)
    before = lm.oriented(SITES[0]).float()
    for _ in range(1000):
        tiny_part.apply(lm)
    moved = lm.oriented(SITES[0], lm.masters[change.place]) - before
    torch.testing.assert_close(moved.double(), 1e-2 * change.update.dense, rtol=1e-2, atol=1e-5)


def test_a_weight_that_is_not_finite_is_refused_and_can_be_undone(lm):
    change = draw(lm, SITES[0])
    content = change.read(lm)
    bad = WeightChange(change.place, Update(change.update.right * torch.inf, change.update.left), change.keys)
    with pytest.raises(NumericalError, match=change.place):
        bad.apply(lm)
    bad.undo(lm, content)
    assert tensor_hash(lm.weight(SITES[0])) == tensor_hash(content[0])


def test_a_change_survives_as_tensors(lm):
    change = draw(lm, SITES[0])
    again = kind_of("WeightChange").from_tensors(change.place, change.tensors())
    assert torch.equal(again.update.dense, change.update.dense)
    assert torch.equal(again.keys, change.keys)
    full = WeightChange(change.place, Update(change.update.dense), change.keys[:0])
    assert kind_of("WeightChange").from_tensors(full.place, full.tensors()).update.left is None
    assert again.update.gradients is None
    gradients = change.update.left + 1
    solved = WeightChange(change.place, replace(change.update, gradients=gradients), change.keys)
    again = kind_of("WeightChange").from_tensors(solved.place, solved.tensors())
    assert torch.equal(again.update.gradients, gradients)


ROWS = torch.ones(2, 3)
FORGERIES = {
    "are not finite matrices": [
        {"right": torch.ones(3)}, {"left": torch.ones(2, 2, 2)}, {"keys": torch.ones(2, 3, dtype=torch.long)},
        {"right": ROWS * float("nan")}, {"left": ROWS * float("inf")}, {"keys": ROWS.bool()},
    ],
    r"\(3, 3\), \(2, 4\), \(2, 3\) do not fit": [{"right": torch.ones(3, 3)}],
    r"\(2, 3\), \(2, 4\), \(2, 5\) do not fit": [{"keys": torch.ones(2, 5)}],
    r"\(2, 3\), \(2, 4\), \(2, 3\), \(2, 3\) do not fit": [{"gradients": ROWS}],
}  # fmt: skip


@pytest.mark.parametrize(("words", "parts"), [(words, each) for words, rows in FORGERIES.items() for each in rows])
def test_forged_tensors_are_no_change(words, parts):
    with pytest.raises(ValueError, match=f"a.weight: keys and factors .*{words}"):
        WeightChange.from_tensors("a.weight", {"right": ROWS, "left": torch.ones(2, 4), "keys": ROWS, **parts})


def test_an_update_of_another_shape_is_refused_before_the_weight_changes(lm):
    weight = lm.oriented(Site(1, "mlp_out"))
    before, (d_out, d_in) = weight.clone(), weight.shape
    for update in (Update(torch.ones(2, d_in), torch.ones(2, d_out + 1)), Update(torch.ones(d_out, 1)), Update(ROWS)):
        with pytest.raises(ShapeError, match=r"a change belongs to the model that it was made for"):
            WeightChange(lm.weight_name(Site(1, "mlp_out")), update).apply(lm)
    assert torch.equal(lm.oriented(Site(1, "mlp_out")), before)


def test_a_module_takes_a_place_and_leaves_it(tiny):
    place = tiny.architecture.path(Site(1, "mlp_out"))
    ids, original = torch.tensor([[3, 5, 7]]), tiny.module(place)
    before, tree = tiny(input_ids=ids).logits, [name for name, _ in tiny.model.named_modules()]
    change = kind_of(Scaled.__name__).from_tensors(place, {"target": torch.tensor(2.0, dtype=torch.float64)})
    content, digest = change.read(tiny), change.hash(tiny)
    change.apply(tiny)
    assert change.hash(tiny) != digest
    assert not torch.equal(tiny(input_ids=ids).logits, before)
    assert {name.removeprefix(f"{place}.") for name in change.state(tiny)} >= {"factor", "inner.weight"}
    change.undo(tiny, content)
    assert tiny.module(place) is original
    assert [name for name, _ in tiny.model.named_modules()] == tree
    assert change.hash(tiny) == digest
    assert torch.equal(tiny(input_ids=ids).logits, before)


def test_an_unknown_kind_is_named():
    with pytest.raises(LedgerError, match=r"'Nothing': known are .*WeightChange"):
        kind_of("Nothing")
