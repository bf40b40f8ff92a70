"""Modules that decide row by row: on what, for how long, and that nothing else has a say."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cakeflow.errors import ArchitectureError, ConfigError, ShapeError
from cakeflow.evaluation import score_targets
from cakeflow.forward import continuations
from cakeflow.models import RoutedModule, Rows, Site, forced_decisions, prompt_lengths, start_at

SITE = Site(3, "mlp_out")
TEXTS = ["The first letter", "She walked along the river", "of the", "In music, a violin has four strings", "Rome"]


class Sign(RoutedModule):
    """Negates what its module says in rows whose deciding inputs have a sum above ``THRESHOLD``, in the mean."""

    def __init__(self, base, scope="prompt", always=None):
        super().__init__(scope)
        self.base, self.always = base, always
        self.values = None

    def forward(self, inputs):
        rows = self.rows_of(inputs)
        tokens = inputs.sum(-1).reshape(rows.shape)
        if self.scope == "token":
            self.values = tokens
        else:
            mask = rows.mask(inputs.device)
            self.values = (tokens * mask).sum(1) / mask.sum(1)
        choice = self.settle(rows, self.decide(self.values))
        output = self.base(inputs)
        return torch.where(choice.reshape(output.shape[:-1])[..., None] == 1, -output, output)

    def decide(self, values):
        return (values > THRESHOLD).long() if self.always is None else torch.full_like(values, self.always).long()


THRESHOLD = 21.31
"""Between the texts' means in the tiny GPT-2."""


class Pushes(RoutedModule):
    """Adds some of three vectors where an answer is written; which, an earlier module's deciding outputs say."""

    def __init__(self, base, always=None):
        super().__init__("prompt", [READ])
        self.base, self.always = base, always
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("vectors", torch.randn(3, base.nf, generator=draw, dtype=torch.float64))

    def forward(self, inputs):
        rows = self.rows_of(inputs)
        choice = self.settle(rows, self.decide(rows))
        active = choice & rows.behind(inputs.device)[..., None]
        output = self.base(inputs)
        return output + (active.double() @ self.vectors).reshape(output.shape)

    def decide(self, rows):
        if self.always is not None:
            return torch.tensor([self.always] * rows.shape[0])
        if rows.held is not None:
            return rows.held
        mask = rows.mask(torch.device("cpu"))[..., None]
        means = (self.output_of(READ, rows)[..., :3] * mask).sum(1) / mask.sum(1)
        return means > MIDDLES


READ = "transformer.h.1.mlp.c_proj"
MIDDLES = torch.tensor([0.04, -0.07, 0.1])
KINDS = {"number": Sign, "set": Pushes}
"""Decisions that are the number of an answer, and those that are a set of parts."""
BOTH = pytest.mark.parametrize("kind", KINDS)


def routed(lm, kind="number", **arguments):
    lm.put(lm.architecture.path(SITE), KINDS[kind](lm.module(SITE), **arguments))
    return lm.module(SITE)


def ids_of(lm, texts, side="right"):
    rows = [lm.tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    order = (lambda row, space: space + row) if side == "left" else (lambda row, space: row + space)
    ids = torch.tensor([order(row, space) for row, space in zip(rows, pads, strict=True)])
    mask = torch.tensor([order(one, space) for one, space in zip(ones, pads, strict=True)])
    return ids, mask


def decisions(lm, texts, side="right"):
    ids, mask = ids_of(lm, texts, side)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        lm(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return lm.module(SITE).decision.tolist()


@BOTH
def test_some_texts_are_routed_and_some_are_not(lm, kind):
    """Else the tests below would say nothing."""
    routed(lm, kind)
    decided = decisions(lm, TEXTS)
    if kind == "number":
        assert set(decided) == {0, 1}
    else:
        assert len(set(map(tuple, decided))) == len(TEXTS)


@pytest.fixture(scope="module", params=KINDS)
def routed_lm(request, _models):
    lm = copy.deepcopy(_models["gpt2"])
    routed(lm, request.param)
    return lm


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=5), st.sampled_from(["left", "right"]))
def test_neither_batch_nor_padding_decides(routed_lm, texts, side):
    alone = [decisions(routed_lm, [text])[0] for text in texts]
    assert decisions(routed_lm, texts, side) == alone


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(TEXTS), st.sampled_from([" a", " of the", " x y z"])), min_size=1, max_size=6)
)
def test_siblings_and_answers_decide_nothing(routed_lm, pairs):
    """Scores are those of each text alone, routed by its prompt."""
    prompts, targets = zip(*pairs, strict=True)
    together = score_targets(routed_lm, prompts, targets)[0]
    alone = torch.cat([score_targets(routed_lm, [p], [t])[0] for p, t in pairs])
    torch.testing.assert_close(together, alone)
    decided = {prompt: decisions(routed_lm, [prompt])[0] for prompt in prompts}
    plain = score_by(routed_lm, decided, pairs)
    torch.testing.assert_close(together, plain)


def score_by(lm, decided, pairs):
    """Mean log-probability of each target, with the decision of its prompt set by hand."""
    module, results = lm.module(SITE), []
    try:
        for prompt, target in pairs:
            module.always = decided[prompt]
            results.append(score_targets(lm, [prompt], [target])[0])
    finally:
        module.always = None
    return torch.cat(results)


@BOTH
@pytest.mark.parametrize(("cache", "attention"), [(None, "sdpa"), ("static", "sdpa"), ("static", "eager")])
def test_a_decision_holds_while_an_answer_is_written(lm, kind, cache, attention):
    """With a static cache, ``generate`` gives the mask of every query."""
    lm.model.set_attn_implementation(attention)
    module = routed(lm, kind)
    ids, mask = ids_of(lm, TEXTS, "left")
    expected = decisions(lm, TEXTS)
    seen = []
    handle = module.register_forward_hook(lambda *_: seen.append(module.decision.tolist()))
    lm.model.generate(ids, attention_mask=mask, max_new_tokens=6, pad_token_id=0, cache_implementation=cache)
    handle.remove()
    assert len(seen) == 6
    assert all(decision == expected for decision in seen)


@pytest.mark.parametrize(
    ("kind", "always"), [("number", 0), ("number", 1), ("set", [False] * 3), ("set", [True, False, True])]
)
def test_written_answers_are_those_of_one_text_alone(lm, kind, always):
    plain = copy.deepcopy(lm)
    routed(lm, kind, always=always)
    texts = continuations(lm, TEXTS, 5)
    assert texts == [continuations(lm, [text], 5)[0] for text in TEXTS]
    assert (texts == continuations(plain, TEXTS, 5)) == (always in (0, [False] * 3))


@pytest.mark.parametrize(("kind", "always"), [("number", 0), ("set", [False] * 3)])
def test_a_module_that_never_answers_changes_no_bit(lm, kind, always):
    ids, mask = ids_of(lm, TEXTS)
    with torch.no_grad():
        before = lm(input_ids=ids, attention_mask=mask).logits
        routed(lm, kind, always=always)
        assert torch.equal(lm(input_ids=ids, attention_mask=mask).logits, before)


@BOTH
def test_beams_of_a_prompt_go_the_same_way(lm, kind):
    routed(lm, kind)
    ids, mask = ids_of(lm, TEXTS[:2], "left")
    lm.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=0
    )
    one, two = decisions(lm, TEXTS[:2])
    lm.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=0
    )
    assert lm.module(SITE).decision.tolist() == [one] * 3 + [two] * 3


@BOTH
def test_a_cache_of_other_rows_is_refused(lm, kind):
    routed(lm, kind)
    ids, mask = ids_of(lm, TEXTS[:2])
    cache = lm(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    with pytest.raises(ShapeError, match="4 rows go on from a cache whose 2 rows were routed"):
        lm(input_ids=torch.ones(4, 1, dtype=torch.long), past_key_values=cache)


@BOTH
def test_a_decision_holds_in_outputs_without_names(lm, kind):
    module = routed(lm, kind)
    ids, mask = ids_of(lm, TEXTS[:1])
    cache = lm(input_ids=ids, attention_mask=mask, use_cache=True, return_dict=False)[1]
    expected = module.decision.tolist()
    lm(input_ids=ids[:, -1:], past_key_values=cache, return_dict=False)
    assert module.decision.tolist() == expected == decisions(lm, TEXTS[:1])


def test_a_new_prompt_of_one_token_is_decided_anew(lm):
    """It looks like a step of writing, but comes with an empty cache."""
    module = routed(lm)
    module.always = 1
    lm(input_ids=torch.tensor([[5]]), use_cache=True)
    module.always = 0
    lm(input_ids=torch.tensor([[5]]), use_cache=True)
    assert module.decision.tolist() == [0]


def test_named_prompts_decide_alone(lm):
    module = routed(lm)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    with torch.no_grad():
        lm(input_ids=ids[:, :2], use_cache=False)
        alone = module.values.clone()
        with prompt_lengths(lm.model, torch.tensor([2])):
            lm(input_ids=ids, use_cache=False)
        torch.testing.assert_close(module.values, alone)
        lm(input_ids=ids, use_cache=False)
    assert not torch.allclose(module.values, alone)


def test_tokens_decide_for_themselves(lm):
    module = routed(lm, scope="token")
    ids, mask = ids_of(lm, TEXTS[3:4])
    with torch.no_grad():
        whole = lm(input_ids=ids, attention_mask=mask, use_cache=False).logits
        decided = module.decision.tolist()
        part = lm(input_ids=ids[:, :4], use_cache=False).logits
    assert decided[0][:4] == module.decision[0].tolist()
    torch.testing.assert_close(whole[:, :4], part)


@BOTH
def test_a_copy_of_a_model_listens_for_itself(lm, kind):
    routed(lm, kind)
    other = copy.deepcopy(lm)
    before = decisions(lm, TEXTS)
    lm.put(lm.architecture.path(SITE), lm.module(SITE).base)
    assert not lm.model._forward_pre_hooks
    assert not any(module._forward_hooks for module in lm.model.modules())
    assert lm.scope is None
    assert other.scope == "prompt"
    assert decisions(other, TEXTS, "left") == before


# ---- what other modules said, and where an answer is written ----


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_answer_is_written_from_the_last_token_of_the_prompt_on(lm, side):
    """So what is read before stays as it is, to the bit, and is not rounded otherwise."""
    plain, every = copy.deepcopy(lm), [True] * 3
    routed(lm, "set", always=every)
    ids, mask = ids_of(lm, TEXTS, side)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    with torch.no_grad():
        changed = lm(**inputs, use_cache=False).logits != plain(**inputs, use_cache=False).logits
    last = (mask * torch.arange(mask.shape[1])).argmax(1)
    for row, at in enumerate(last.tolist()):
        assert changed[row, at].any()
        assert not changed[row, :at][mask[row, :at].bool()].any()


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_the_places_of_an_answer(rows):
    deciding = torch.tensor(rows)
    behind = Rows(tuple(deciding.shape), deciding).behind(torch.device("cpu"))
    for row, places in zip(rows, behind.tolist(), strict=True):
        last = max((i for i, true in enumerate(row) if true), default=5)
        assert places == [i >= last for i in range(5)]
    held = Rows(tuple(deciding.shape), deciding, torch.zeros(len(rows)))
    assert held.behind(torch.device("cpu")).all()


def test_a_module_that_reads_follows_a_change_of_its_source(lm):
    module = routed(lm, "set")
    before = decisions(lm, TEXTS)
    source = lm.module(READ)
    lm.put(READ, torch.nn.Sequential(source, Zero()))
    assert decisions(lm, TEXTS) == [(MIDDLES < 0).tolist()] * len(TEXTS)
    lm.put(READ, source)
    assert decisions(lm, TEXTS) == before
    assert module._listener.outputs == {}


class Zero(torch.nn.Module):
    def forward(self, x):
        return 0 * x


def test_a_source_that_is_not_there_or_did_not_run_is_named(lm):
    module = Pushes(lm.module(SITE))
    module.reads = ("transformer.h.99.mlp",)
    with pytest.raises(ArchitectureError, match=r"no module 'transformer\.h\.99\.mlp'"):
        lm.put(lm.architecture.path(SITE), module)
    assert lm.scope is None
    routed(lm, "set")
    with (
        start_at(lm, SITE.layer, torch.zeros(1, 2, lm.width, dtype=torch.float64)),
        pytest.raises(ConfigError, match=r"nothing can be decided: transformer\.h\.1.mlp\.c_proj did not run"),
    ):
        lm(input_ids=torch.ones(1, 2, dtype=torch.long), use_cache=False)


# ---- decisions that are forced ----


def tokens(lm, text):
    return tuple(lm.tokenizer(text)["input_ids"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_forced_decisions_go_by_the_prompt(lm, side):
    module = routed(lm)
    own = decisions(lm, TEXTS)
    named = {tokens(lm, text): 1 - decision for text, decision in zip(TEXTS[:3], own, strict=False)}
    with forced_decisions(lm.model, named):
        assert decisions(lm, TEXTS, side) == [*(1 - decision for decision in own[:3]), 0, 0]
        longer = f"{TEXTS[0]} of Rome"
        assert decisions(lm, [longer], side) == [1 - own[0]]
        with prompt_lengths(lm.model, torch.tensor([len(tokens(lm, TEXTS[0]))])):
            lm(input_ids=torch.tensor([tokens(lm, longer)]), use_cache=False)
        assert module.decision.tolist() == [1 - own[0]]
    assert decisions(lm, TEXTS, side) == own


@pytest.mark.parametrize("decision", [0, 1])
def test_forced_decisions_hold_while_an_answer_is_written(lm, decision):
    module = routed(lm)
    module.always = decision
    expected = continuations(lm, TEXTS, 5)
    module.always = None
    with forced_decisions(lm.model, {tokens(lm, text): decision for text in TEXTS}):
        assert continuations(lm, TEXTS, 5) == expected


def test_forced_decisions_outlast_what_happens_in_the_body(lm):
    module = routed(lm)
    path, own = lm.architecture.path(SITE), decisions(lm, TEXTS)
    with forced_decisions(lm.model, {(): 1}):
        with forced_decisions(lm.model, {(): 0}):
            assert decisions(lm, TEXTS) == [0] * len(TEXTS)
        assert decisions(lm, TEXTS) == [1] * len(TEXTS)
        lm.put(path, module.base)
        lm.put(path, module)
        assert decisions(lm, TEXTS) == [1] * len(TEXTS)
    assert decisions(lm, TEXTS) == own


def test_decisions_on_tokens_are_not_forced(lm):
    routed(lm, scope="token")
    with pytest.raises(ConfigError, match="scope token"), forced_decisions(lm.model, {}):
        raise AssertionError


def test_a_prompt_without_a_token_is_refused(lm):
    routed(lm)
    ids, mask = ids_of(lm, TEXTS[:2])
    mask[1] = 0
    with pytest.raises(ShapeError, match="row 1 of 2 has no token on which its route can be decided"):
        lm(input_ids=ids, attention_mask=mask, use_cache=False)


def test_the_last_deciding_token():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]]).bool()
    assert Rows((3, 4), mask).last(torch.device("cpu")).tolist() == [1, 3, 2]
    assert Rows((2, 3)).last(torch.device("cpu")).tolist() == [2, 2]
