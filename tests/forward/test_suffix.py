"""Suffix passes give the numbers of full passes: every site, any grouping, any subset of facts."""

import pytest
import torch
from conftest import random_model

from cakeflow import Contexts
from cakeflow.errors import ArchitectureError
from cakeflow.forward.suffix import before_targets, cut, first_changed
from cakeflow.forward.tokens import Row, encode_batch
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture

CONTEXTS = Contexts.of(["{}", "Therefore, the answer is not that. {}", "I am. {}"])
SITES = [Site(2), Site(0), Site(5), Site(3, "mlp_out"), Site(0, "mlp_out"), Site(2, "attn_out"), Site(5, "attn_out")]


@pytest.fixture
def rows(lm, requests):
    return [row for variants in encode_batch(lm, requests[:5], CONTEXTS).rows for row in variants]


def full_pass(lm, row, sites, delta):
    """Logits of the whole row with each site's delta added at the subject, and what the sites gave before that."""
    handles = []
    for site, each in zip(sites, delta, strict=True):

        def add(_module, _args, output, each=each):
            value = output[0] if isinstance(output, tuple) else output
            changed = value.clone()
            changed[0, row.subject] += each
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handles.append(lm.module(site).register_forward_hook(add))
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        logits = lm.model(input_ids=ids, use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    held = []
    for site in sites:
        with torch.no_grad(), capture(lm, [site]) as output:
            lm.model(input_ids=ids, use_cache=False)
        held.append(output[site][0, row.subject])
    return logits, torch.stack(held)


def check(lm, rows, sites, max_tokens, *, read_first=False, tolerance=1e-9):
    groups, outputs = cut(lm, rows, range(len(rows)), sites, max_tokens, read_first=read_first)
    delta = torch.randn(outputs.shape, dtype=outputs.dtype, generator=torch.Generator().manual_seed(3))
    full = [full_pass(lm, row, sites, delta[i]) for i, row in enumerate(rows)]
    torch.testing.assert_close(outputs, torch.stack([output for _, output in full]), rtol=0, atol=tolerance)
    seen = []
    for group in groups:
        logits = group.logits(lm, sites, delta[group.fact])
        steps = (group.column - group.changed_column[group.row]).tolist()
        for line, i, step, label in zip(logits, group.fact[group.row].tolist(), steps, group.label, strict=True):
            at = rows[i].subject + step
            assert int(label) == (-1 if read_first else rows[i].ids[at + 1])
            torch.testing.assert_close(line, full[i][0][at], rtol=0, atol=tolerance)
            seen.append((i, at))
    ends = [[row.subject] if read_first else range(row.target - 1, len(row.ids) - 1) for row in rows]
    assert sorted(seen) == [(i, at) for i, places in enumerate(ends) for at in places]
    return groups


@pytest.mark.parametrize("site", SITES, ids=str)
def test_equals_full_passes(tiny, rows, site):
    check(tiny, rows, [site], 1024)


def test_two_changes_in_one_block(tiny, rows):
    check(tiny, rows, [Site(3, "mlp_out"), Site(3, "attn_out")], 1024)


@pytest.mark.parametrize("max_tokens", [1, 12, 40])
def test_any_grouping_gives_the_same_numbers(tiny, rows, max_tokens):
    groups = check(tiny, rows, [Site(2)], max_tokens)
    assert len(groups) > 1
    assert all(group.tokens.numel() <= max_tokens or len(group.tokens) == 1 for group in groups)


def test_reading_at_the_subject_only(tiny, lm, requests):
    batch = encode_batch(lm, requests, CONTEXTS)
    groups = check(tiny, list(batch.essence), [Site(2)], 1024, read_first=True)
    assert {group.tokens.shape[1] for group in groups} == {1}


def test_a_subject_at_the_very_start_has_no_prefix(tiny, requests):
    ids = tuple(tiny.tokenizer("Oslo lies in Norway and nowhere else")["input_ids"])
    check(tiny, [Row(ids, 0, 3), Row(ids[:4], 0, 2)], [Site(1)], 1024)


def test_only_keeps_the_rows_of_the_facts_that_are_left(tiny, rows):
    facts = [i // 3 for i in range(len(rows))]
    groups, _ = cut(tiny, rows, facts, [Site(2)], 60)
    kept = torch.tensor([True, False, True, False, False])
    delta = torch.randn(5, 1, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = 0
    for group in groups:
        if not kept[group.fact].any():
            continue
        part = group.only(kept)
        read = kept[group.fact][group.row]
        expected = group.logits(tiny, [Site(2)], delta[group.fact])[read]
        got = part.logits(tiny, [Site(2)], delta[part.fact])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        assert torch.equal(part.label, group.label[read])
        assert part.only(kept) is part
        total += len(part.fact)
    assert total == 6


def test_running_twice_gives_the_same_bits(tiny, rows):
    """What a pass appends to the prefix cache must be forgotten."""
    group = cut(tiny, rows, range(len(rows)), [Site(2)], 1024)[0][0]
    delta = torch.ones(len(group.fact), 1, 48, dtype=torch.float64)
    assert torch.equal(group.logits(tiny, [Site(2)], delta), group.logits(tiny, [Site(2)], delta))


def test_gradients_equal_those_of_full_passes(tiny, rows):
    site, row = Site(2), rows[4]
    (group,), _ = cut(tiny, [row], [0], [site], 1024)
    delta = torch.zeros(1, 48, dtype=torch.float64, requires_grad=True)
    group.logits(tiny, [site], delta[:, None]).log_softmax(-1)[:, 7].sum().backward()
    fast, delta.grad = delta.grad, None
    hook = tiny.module(site).register_forward_hook(
        lambda _m, _a, out: out.index_put((torch.tensor([0]), torch.tensor([row.subject])), delta, accumulate=True)
    )
    logits = tiny.model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, row.target - 1 : -1]
    hook.remove()
    logits.log_softmax(-1)[:, 7].sum().backward()
    torch.testing.assert_close(fast, delta.grad, rtol=0, atol=1e-6 * float(delta.grad.abs().max()))


def test_half_precision_stays_close(lm, rows):
    lm.model.to(torch.bfloat16)
    check(lm, rows, [Site(2)], 1024, tolerance=0.25)


def test_first_changed():
    assert [first_changed(Site(3)), first_changed(Site(3, "mlp_out")), first_changed(Site(0, "attn_out"))] == [4, 3, 0]


def test_before_targets_from_the_subject_and_from_the_start(rows):
    row = rows[0]
    from_subject = before_targets([row])
    from_start = before_targets([row], from_fact=False)
    assert [(r, c + row.subject, label) for r, c, label in from_subject] == from_start
    assert [label for *_, label in from_start] == list(row.ids[row.target :])
    assert [column for _, column, _ in from_start] == list(range(row.target - 1, len(row.ids) - 1))


EXTRA = {"vocab_size": 600, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
WINDOWED = {
    "mistral": {"intermediate_size": 40, "num_key_value_heads": 1, "sliding_window": 4},
    "gemma2": {"intermediate_size": 40, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4},
}
ALIBI = {"bloom": {}, "falcon": {"alibi": True, "parallel_attn": False}, "mpt": {"n_heads": 2, "n_layers": 4}}


def random(family, tokenizer, **changes):
    lm = random_model(family, tokenizer, **{**EXTRA, **changes})
    lm.model.double()
    return lm


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_shorter_than_the_row_is_refused(family, lm, rows):
    """A mask of our own leaves it out; that must not pass silently."""
    with pytest.raises(ArchitectureError, match="the window or chunk that the model attends to"):
        check(random(family, lm.tokenizer, **WINDOWED[family]), rows, [Site(0)], 1024)


@pytest.mark.parametrize("sites", [[Site(0)], [Site(2, "mlp_out"), Site(2, "attn_out")]], ids=str)
@pytest.mark.parametrize("family", ALIBI)
def test_attention_without_positions_runs_whole_rows(family, sites, lm, rows):
    model = random(family, lm.tokenizer, **ALIBI[family])
    groups = check(model, rows, sites, 1024, tolerance=1e-5)
    assert all(group.mask is None for group in groups)
    kept = torch.tensor([i % 3 == 0 for i in range(len(rows))])
    delta = torch.ones(len(rows), len(sites), EXTRA["hidden_size"], dtype=torch.float64)
    part, group = groups[0].only(kept), groups[0]
    read = kept[group.fact][group.row]
    expected = group.logits(model, sites, delta[group.fact])[read]
    torch.testing.assert_close(part.logits(model, sites, delta[part.fact]), expected, rtol=0, atol=1e-5)
