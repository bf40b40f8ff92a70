"""The module that composes edits: what it adds and where, which edits a row retrieves, and what it refuses."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from cakeflow_sidememory import ComposedProjection, ComposedSettings, FactorChange, Retrieval, ShardedProjection
from cakeflow_sidememory.composition import read_representations
from cakeflow_sidememory.factors import Factors
from cakeflow_sidememory.shards import ShardSettings
from hypothesis import given, settings
from hypothesis import strategies as st

from cakeflow.errors import ConfigError, LedgerError, ShapeError
from cakeflow.evaluation import score_targets
from cakeflow.forward import continuations, encode
from cakeflow.models import Site

NEAR = Site(1, "mlp_out")
EDITS = [("Lund", "The first letter of Lund"), ("Lund", "People say that Lund"), ("Rome", "In the town of Rome")]
"""Subject and prompt of each edit; the first two have different states, as what comes before the subject differs."""
TEXTS = ["The first letter of Lund", "In the town of Rome", "of the", "In the town of Rome lies Lund"]


def up(lm):
    names = dict(lm.module(Site(5)).named_modules())
    return Site(5, "mlp.up_proj" if "mlp.up_proj" in names else "mlp.c_fc")


def rows_of(lm):
    texts = [f"{prompt} is a" for _, prompt in EDITS]
    return encode(lm.tokenizer, texts, [len(p) for _, p in EDITS], [len(p) for _, p in EDITS])


def change_of(lm, size=1.0, facts=(1, 2, 3), **kwargs):
    generator = torch.Generator().manual_seed(0)
    width, neurons = lm.width, lm.key_width(Site(5, "mlp_out"))
    factors = Factors(
        torch.randn(3, width, generator=generator, dtype=torch.float64),
        size * torch.randn(3, neurons, generator=generator, dtype=torch.float64),
        torch.rand(3, neurons, generator=generator) < 0.5,
        2.0,
    )
    rules = ComposedSettings(lm.architecture.path(NEAR), **{"retrieval": Retrieval(0.9), **kwargs})
    states = read_representations(lm, rows_of(lm), 1, 1).subject
    return FactorChange(lm.architecture.path(up(lm)), rules, factors, states, torch.tensor(facts))


def composed(lm, **kwargs):
    change = change_of(lm, **kwargs)
    lm.put(change.place, change.build(lm.module(change.place)))
    return lm.module(change.place)


def inputs_of(lm, texts, side="right"):
    rows = [lm.tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    order = (lambda row, pads: pads + row) if side == "left" else (lambda row, pads: row + pads)
    ids = torch.tensor([order(row, [0] * (width - len(row))) for row in rows])
    mask = torch.tensor([order([1] * len(row), [0] * (width - len(row))) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def run(lm, texts, side="right"):
    with torch.no_grad():
        return lm(**inputs_of(lm, texts, side), use_cache=False).logits


def decisions(lm, texts, side="right"):
    run(lm, texts, side)
    return lm.module(up(lm)).decision.tolist()


def plain_change(memory, edits, x):
    """The paper's rule for one token, element by element."""
    each = []
    for i in edits:
        a, b, keep = memory.direction[i], memory.output[i], memory.neurons[i]
        cosine = float(x @ a / (x.norm() * a.norm()))
        each.append([cosine * 2.0 * float(value) * float(free) for value, free in zip(b, keep, strict=True)])
    columns = list(zip(*each, strict=True))
    agree = [all(one * other >= 0 for one in column for other in column) for column in columns]
    return torch.tensor([sum(column) if same else 0.0 for column, same in zip(columns, agree, strict=True)])


@pytest.mark.parametrize("edits", [(0,), (0, 1), (0, 1, 2)])
def test_the_composed_change_is_added_at_the_last_token_of_the_prompt(tiny, edits):
    plain, site = copy.deepcopy(tiny), up(tiny)
    memory = composed(tiny)
    last = len(tiny.tokenizer(TEXTS[0])["input_ids"]) - 1

    def hook(_module, args, output):
        delta = torch.zeros_like(output)
        delta[0, last] = plain_change(memory, edits, args[0][0, last])
        return output + delta

    handle = plain.module(site).register_forward_hook(hook)
    expected = run(plain, TEXTS[:1])
    handle.remove()
    with memory.oracle(edits):
        torch.testing.assert_close(run(tiny, TEXTS[:1]), expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(expected[0, last], run(plain, TEXTS[:1])[0, last])


def test_a_row_retrieves_the_edits_whose_subjects_it_names(tiny):
    composed(tiny)
    first, rome, neither, both = decisions(tiny, TEXTS)
    assert (first[0], first[2]) == (True, False)
    assert rome == [False, False, True]
    assert neither == [False] * 3
    assert both[2]


def test_a_silent_memory_changes_no_bit(tiny):
    plain = copy.deepcopy(tiny)
    memory = composed(tiny)
    with memory.oracle(()):
        assert torch.equal(run(tiny, TEXTS), run(plain, TEXTS))
        assert continuations(tiny, TEXTS, 5) == continuations(plain, TEXTS, 5)
    assert torch.equal(run(tiny, TEXTS)[2], run(plain, TEXTS)[2])  # beside rows that retrieve


@pytest.fixture(scope="module")
def edited_lm(_models):
    lm = copy.deepcopy(_models["llama"])
    composed(lm)
    return lm


@settings(max_examples=200)
@given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=5), st.sampled_from(["left", "right"]))
def test_neither_batch_nor_padding_decides(edited_lm, texts, side):
    alone = [decisions(edited_lm, [text])[0] for text in texts]
    assert decisions(edited_lm, texts, side) == alone


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from(TEXTS), st.sampled_from([" a", " Rome", " Lund, a town"])), min_size=1, max_size=6
    )
)
def test_neither_siblings_nor_answers_decide(edited_lm, pairs):
    """An answer may name a subject: its own prompt has decided before."""
    prompts, targets = zip(*pairs, strict=True)
    together = score_targets(edited_lm, prompts, targets)[0]
    memory, alone = edited_lm.module(up(edited_lm)), []
    for prompt, target in pairs:
        (decided,) = decisions(edited_lm, [prompt])
        with memory.oracle([i for i, retrieved in enumerate(decided) if retrieved]):
            alone.append(score_targets(edited_lm, [prompt], [target])[0])
    torch.testing.assert_close(together, torch.cat(alone))


def test_a_decision_holds_while_the_answer_is_written(tiny):
    memory = composed(tiny, size=20.0)
    expected, seen = decisions(tiny, TEXTS), []
    handle = memory.register_forward_hook(lambda *_: seen.append(memory.decision.tolist()))
    inputs = inputs_of(tiny, TEXTS, "left")
    del inputs["position_ids"]
    tiny.model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    handle.remove()
    assert seen == [expected] * 6
    written = continuations(tiny, TEXTS, 6)
    assert written == [continuations(tiny, [text], 6)[0] for text in TEXTS]


def test_every_written_token_is_changed(tiny):
    """With the cache, and without it where the whole text is read again, apart from the scope of the decision."""
    memory, site = composed(tiny, size=20.0), up(tiny)
    inputs, active = inputs_of(tiny, TEXTS[:1]), []
    handle = memory.register_forward_hook(lambda _m, args, out: active.append(out - memory.base(args[0])))
    with torch.no_grad():
        cache = tiny(input_ids=inputs["input_ids"], use_cache=True).past_key_values
        tiny(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)
    handle.remove()
    prompt, answer = active
    assert not prompt[0, :-1].any()
    assert prompt[0, -1].any()
    assert answer[0].any(1).all()
    assert tiny.module(site) is memory


def test_a_fact_that_was_edited_again_acts_with_its_last_factors(tiny):
    memory = composed(tiny, facts=(7, 8, 7))
    with memory.oracle([0, 1]):
        run(tiny, TEXTS[:1])
    assert not torch.tensor(decisions(tiny, TEXTS))[:, 0].any()
    assert decisions(tiny, TEXTS)[1] == [False, False, True]


def test_fewer_edits_than_top_are_no_reason_not_to_answer(tiny):
    composed(tiny, retrieval=Retrieval(0.9, top=50))
    assert decisions(tiny, TEXTS)[1] == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_types_of_weights(tiny, dtype):
    exact = copy.deepcopy(tiny)
    composed(exact, size=20.0)
    tiny.model.to(dtype)
    memory = composed(tiny, size=20.0)
    assert memory.direction.dtype == torch.float64
    assert decisions(tiny, TEXTS) == decisions(exact, TEXTS)
    assert run(tiny, TEXTS).dtype == dtype


def test_an_oracle_names_edits_that_are_stored(lm):
    memory = composed(lm)
    with pytest.raises(ConfigError, match="edits 3 are not stored"), memory.oracle([3]):
        pass
    with memory.oracle([2, 1]):
        assert decisions(lm, TEXTS[:2]) == [[False, True, True]] * 2
    assert decisions(lm, TEXTS[1:2]) == [[False, False, True]]


def test_changes_come_back_from_their_tensors_and_stand_on_each_other(lm):
    change = change_of(lm)
    again = FactorChange.from_tensors(change.place, change.tensors())
    plain = lm.module(change.place)
    states = [each.build(plain).state_dict() for each in (change, again)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    both = replace(change, facts=torch.tensor([4, 5, 6])).build(change.build(plain))
    assert (len(both), both.facts.tolist(), both.base) == (6, [1, 2, 3, 4, 5, 6], plain)


def test_factors_of_another_kind_are_refused_when_they_are_read(lm):
    change = change_of(lm)
    tensors = change.tensors()
    for damage, message in (
        ({"scale": torch.tensor([torch.nan]).double()}, "scale are not finite numbers"),
        ({"scale": torch.ones(2).double()}, "have no scale"),
        ({"states": tensors["states"] * torch.inf}, "states are not finite numbers"),
        ({"direction": tensors["direction"][0]}, "direction are not finite numbers in 2 dimensions"),
        ({"neurons": tensors["neurons"].long()}, "neurons of another shape"),
        ({"neurons": tensors["neurons"][:, :1]}, "neurons of another shape"),
        ({"facts": tensors["facts"].double()}, "facts are not whole numbers"),
    ):
        with pytest.raises(LedgerError, match=f"{message}.*; take it from a copy"):
            FactorChange.from_tensors(change.place, {**tensors, **damage})


def narrow(factors, scale=2.0, width=3):
    return Factors(factors.direction[:, :width], factors.output, factors.neurons, scale)


def test_what_does_not_fit_is_refused_before_anything_changes(lm):
    change = change_of(lm)
    memory, plain = composed(lm), lm.module(up(lm)).base
    shards = ShardedProjection.around(lm.module(NEAR), ShardSettings(activation="gelu"))
    factors = change.factors
    for module, other, message in (
        (memory, replace(change, settings=replace(change.settings, rule="outermost")), "are composed by"),
        (memory, replace(change, factors=replace(factors, scale=3.0)), "factors of scales"),
        (shards, change, "a ShardedProjection is in place of the projection"),
        (plain, replace(change, factors=narrow(factors)), "factors of a projection from 3 to"),
        (memory, replace(change, factors=narrow(factors)), "factors of a projection from 3 to"),
        (lm.module(NEAR), change, "do not fit one from"),
        (torch.nn.Identity(), change, "do not fit one from 0 to 0"),
        (plain, replace(change, facts=torch.tensor([1])), re.escape("facts of [1, 3] edits")),
    ):
        with pytest.raises((ConfigError, ShapeError), match=message):
            other.build(module)
    assert lm.module(up(lm)) is memory
    with pytest.raises(ConfigError, match="rule must be one of agreeing, outermost"):
        ComposedSettings("a", rule="sum")


def test_a_cache_with_decisions_about_other_edits_is_refused(lm):
    composed(lm)
    cache = lm(**inputs_of(lm, TEXTS[:1]), use_cache=True).past_key_values
    change = change_of(lm)
    lm.put(change.place, replace(change, facts=torch.tensor([4, 5, 6])).build(lm.module(change.place)))
    with pytest.raises(ShapeError, match="a cache has decisions about 3 edits, and 6 are stored"):
        lm(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert isinstance(lm.module(change.place), ComposedProjection)
