"""Layouts of an edited weight: the same bits again, in the fewest bytes, and nothing else."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from cakeflow.export.delta_layout import Layout, packed, summary, unpacked
from cakeflow.solvers import Update
from cakeflow.storage.hashing import tensor_hash

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPE = (48, 96)


def drawn(ranks, seed=0, shape=SHAPE, scale=0.03):
    generator = torch.Generator().manual_seed(seed)
    one, two = (lambda n, width: torch.randn(n, width, dtype=torch.float64, generator=generator) for _ in range(2))
    return [Update(scale * one(rank, shape[1]), two(rank, shape[0])) for rank in ranks]


def weight_of(dtype, seed=1, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def edited_by(original, updates):
    """As an edit leaves the weight: a matrix product for each change, in a float32 master for half precision."""
    master = original.float() if original.element_size() == 2 else original.clone()
    for update in updates:
        master = (master.double() + update.dense).to(master.dtype)
    return master.to(original.dtype)


def same_bits(one, other):
    return tensor_hash(one) == tensor_hash(other)


@given(
    dtype=st.sampled_from(DTYPES),
    ranks=st.lists(st.integers(1, 4), max_size=4),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    seed=st.integers(0, 99),
    noise=st.integers(0, 3),
)
def test_the_bits_come_again_whatever_the_layout(dtype, ranks, height, width, seed, noise):
    original, updates = weight_of(dtype, seed, (height, width)), drawn(ranks, seed, (height, width))
    edited = edited_by(original, updates)
    edited.view(-1)[:noise] *= 1.5  # entries that no factor accounts for
    layout, parts = packed(original, edited, updates)
    assert layout.bytes == sum(each.nbytes for each in parts.values()) <= edited.nbytes
    assert layout.saved == edited.nbytes - layout.bytes
    assert same_bits(unpacked(original, layout, parts), edited)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_facts_are_factors_with_their_ranks(dtype):
    original, updates = weight_of(dtype), drawn([2, 1])
    layout, parts = packed(original, edited_by(original, updates), updates)
    assert (layout.layout, layout.ranks) == ("factors", [2, 1])
    assert {name: parts[name].shape for name in ("left", "right")} == {"left": (3, 48), "right": (3, 96)}
    if dtype == torch.float64:  # a sum in another order has other last bits, which float32 and half round away
        assert layout.entries > 0
    else:
        assert layout.saved > 0.7 * original.nbytes


def test_one_fact_in_float64_is_a_factor_too():
    original, updates = weight_of(torch.float64), drawn([1, 1])
    layout, _ = packed(original, edited_by(original, updates), updates)
    assert (layout.layout, layout.ranks, layout.entries) == ("factors", [1, 1], 0)


def test_a_bias_is_one_row_and_whole_as_it_stands():
    original = torch.randn(48)
    layout, parts = packed(original[None], original[None] + 1, [Update(torch.ones(1, 48, dtype=torch.float64))])
    assert layout == Layout(layout="dense", bytes=192, saved=0)
    assert same_bits(unpacked(original, layout, {"": parts[""][0]}), original + 1)


def test_more_facts_than_pay_are_the_weight_itself():
    original, updates = weight_of(torch.float32), drawn([40, 40])
    edited = edited_by(original, updates)
    layout, parts = packed(original, edited, updates)
    assert layout == Layout(layout="dense", bytes=edited.nbytes, saved=0)
    assert set(parts) == {""}


@pytest.mark.parametrize(("keep", "places"), [(0.2, torch.uint8), (0.01, torch.int32)], ids=["bits", "numbers"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_masked_change_is_its_entries(dtype, keep, places):
    """RECT keeps a share of the entries: a bit for each says which, or their numbers where they are few."""
    original, change = weight_of(dtype), weight_of(torch.float64, 5)
    mask = change.abs() >= change.abs().flatten().quantile(1 - keep)
    edited = edited_by(original, [Update(change * mask)])
    layout, parts = packed(original, edited, [Update(change * mask)])
    count = int((edited != original).sum())
    assert (layout.layout, layout.ranks, layout.entries) == ("sparse", [], count)
    assert parts["places"].dtype == places
    assert layout.bytes == count * original.element_size() + (48 * 96 // 8 if keep == 0.2 else 4 * count)
    assert same_bits(unpacked(original, layout, parts), edited)


def test_a_change_that_is_no_product_of_factors_is_the_weight_itself():
    original = weight_of(torch.float32)
    updates = [*drawn([1]), Update(torch.randn(SHAPE, dtype=torch.float64))]
    layout, _ = packed(original, edited_by(original, updates), updates)
    assert layout.layout == "dense"


def test_products_are_added_up_in_one_order():
    """Against numpy, entry by entry: no library has a say in the bits."""
    original, (update,) = weight_of(torch.float32), drawn([7])
    _, parts = packed(original, edited_by(original, [update]), [update])
    left, right, total = parts["left"].double().numpy(), parts["right"].double().numpy(), np.zeros(SHAPE)
    for row, column in zip(left, right, strict=True):
        total = total + row[:, None] * column[None, :]
    expected = (original.double().numpy() + total).astype(np.float32)
    factors = {name: parts[name] for name in ("left", "right")}
    size = sum(each.nbytes for each in factors.values())
    alone = Layout(layout="factors", ranks=[7], bytes=size, saved=original.nbytes - size)
    assert np.array_equal(unpacked(original, alone, factors).numpy().view(np.int32), expected.view(np.int32))


SCRIPT = """
import json, sys
from pathlib import Path
from cakeflow.export.delta_layout import Layout, unpacked
from cakeflow.storage.hashing import tensor_hash
from safetensors.torch import load_file
parts = load_file(sys.argv[1])
print(tensor_hash(unpacked(parts.pop("original"), Layout(**json.loads(sys.argv[2])), parts)))
"""


@pytest.mark.parametrize("vectors", ["default", "avx2", "avx512"])
def test_the_bits_do_not_depend_on_the_processor(tmp_path, vectors):
    """Another process, in which torch takes other vectors and two threads; a matrix product may differ there."""
    original, updates = weight_of(torch.float32, shape=(96, 700)), drawn([8, 8], shape=(96, 700))
    edited = edited_by(original, updates)
    layout, parts = packed(original, edited, updates)
    assert layout.layout == "factors"
    save_file({"original": original, **parts}, tmp_path / "parts.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "parts.safetensors"), layout.model_dump_json()],
        capture_output=True, text=True, check=True,
        env=os.environ | {"ATEN_CPU_CAPABILITY": vectors, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.stdout.strip() == tensor_hash(edited)


def test_a_last_bit_that_another_library_gave_is_kept():
    """Where a product was rounded otherwise, the entry stands by itself."""
    original, updates = weight_of(torch.float32), drawn([3])
    edited = edited_by(original, updates)
    edited[5, 7] = torch.nextafter(edited[5, 7], torch.tensor(torch.inf))
    edited[6, 8] = -0.0
    layout, parts = packed(original, edited, updates)
    assert layout.layout == "factors"
    assert layout.entries >= 2
    assert same_bits(unpacked(original, layout, parts), edited)


def test_a_change_of_nothing_is_nothing():
    original = weight_of(torch.float32)
    layout, parts = packed(original, original, [])
    assert (layout.layout, layout.bytes, parts) == ("sparse", 0, {})
    assert same_bits(unpacked(original, layout, parts), original)


ORIGINAL = weight_of(torch.float32)
LEFT, RIGHT = torch.ones(2, 48), torch.ones(2, 96)
ONE = torch.ones(1)
ENDS = torch.tensor([3, 48 * 96 - 1], dtype=torch.int32)
TWO = torch.ones(2)


@pytest.mark.parametrize(
    ("kind", "ranks", "parts", "words"),
    [
        ("factors", [2], {"left": LEFT}, "belong"),
        ("factors", [3], {"left": LEFT, "right": RIGHT}, "belong"),
        ("factors", [1], {"left": LEFT, "right": RIGHT}, "belong"),
        ("factors", [2], {"left": RIGHT, "right": LEFT}, "belong"),
        ("factors", [2], {"left": LEFT, "right": RIGHT[0]}, "belong"),
        ("factors", [2], {"left": LEFT, "right": RIGHT, "other": ONE}, "belong"),
        ("factors", [2], {"left": LEFT, "right": RIGHT.double()}, "other types"),
        ("factors", [2], {"left": LEFT.int(), "right": RIGHT.int()}, "other types"),
        ("factors", [2], {"left": LEFT.half(), "right": RIGHT.half()}, "other types"),
        ("factors", [], {"left": LEFT, "right": RIGHT}, "factors with ranks"),
        ("sparse", [2], {"left": LEFT, "right": RIGHT}, "sparse with ranks"),
        ("sparse", [], {"values": TWO}, "belong"),
        ("sparse", [], {"places": ENDS}, "belong"),
        ("sparse", [], {"places": ENDS, "values": TWO.double()}, "other types"),
        ("sparse", [], {"places": ENDS + 1, "values": TWO}, "ascending numbers below 4608"),
        ("sparse", [], {"places": ENDS - 4, "values": TWO}, "ascending numbers"),
        ("sparse", [], {"places": ENDS.flip(0), "values": TWO}, "ascending numbers"),
        ("sparse", [], {"places": ENDS[:1].repeat(2), "values": TWO}, "ascending numbers"),
        ("sparse", [], {"places": ENDS[:1], "values": TWO}, "1 places for 2 entries"),
        ("sparse", [], {"places": ENDS[None], "values": TWO}, "places are torch.int32"),
        ("sparse", [], {"places": ENDS.float(), "values": TWO}, "places are torch.float32"),
        ("sparse", [], {"places": torch.full((576,), 255, dtype=torch.uint8), "values": TWO}, "4608 places for 2"),
        ("sparse", [], {"places": torch.zeros(575, dtype=torch.uint8), "values": TWO}, "places are torch.uint8"),
        ("dense", [], {"": ORIGINAL.T.contiguous()}, "belong"),
        ("dense", [], {"": ORIGINAL.bfloat16()}, "other types"),
        ("dense", [], {"": ORIGINAL, "values": ONE, "places": ENDS[:1]}, "dense with ranks"),
    ],
)
def test_what_does_not_fit_is_refused(kind, ranks, parts, words):
    size = sum(each.nbytes for each in parts.values())
    layout = Layout(layout=kind, ranks=ranks, entries=len(parts.get("values", ())), bytes=size,
                    saved=max(0, ORIGINAL.nbytes - size))  # fmt: skip
    with pytest.raises(ValueError, match=words):
        unpacked(ORIGINAL, layout, parts)


def test_bits_behind_the_last_entry_are_refused():
    bits = torch.tensor([1], dtype=torch.uint8)  # of 7 entries
    layout = Layout(layout="sparse", entries=1, bytes=5, saved=23)
    with pytest.raises(ValueError, match="below 7"):
        unpacked(torch.zeros(1, 7), layout, {"places": bits, "values": torch.ones(1)})


def test_sizes_that_are_not_stated_are_refused():
    layout = Layout(layout="factors", ranks=[2], bytes=LEFT.nbytes, saved=ORIGINAL.nbytes - LEFT.nbytes)
    with pytest.raises(ValueError, match="1152 bytes, where the manifest says 384"):
        unpacked(ORIGINAL, layout, {"left": LEFT, "right": RIGHT})


def test_a_summary_names_every_layout():
    layouts = {
        "a": Layout(layout="factors", ranks=[2, 1], bytes=100, saved=900),
        "b": Layout(layout="factors", ranks=[3], bytes=100, saved=900),
        "c": Layout(layout="sparse", entries=5, bytes=300, saved=700),
        "d": Layout(layout="dense", bytes=1000, saved=0),
    }
    kinds, size = summary(layouts).split("; ")
    assert kinds == "2 as factors of rank 3, 1 as the entries that differ, 1 whole"
    assert size == "1,500 bytes, 2,500 fewer than the weights (62 %)"
