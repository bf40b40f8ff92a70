"""Questions to a memory: an oracle sends each to its own answer, in evaluations and nowhere else."""

import copy

import pytest
import torch
from cakeflow_sidememory import (
    CodebookMemory,
    CodebookSettings,
    FactorMemory,
    FactorTraining,
    LearningRule,
    Margin,
    ShardSettings,
    SideMemory,
)
from cakeflow_sidememory.questions import learned
from tiny_runs import module_of

from cakeflow import Contexts, Editor, EditRequest
from cakeflow.data import Probe
from cakeflow.errors import ArchitectureError, ConfigError, RequestWarning
from cakeflow.evaluation import Evaluation, score_targets
from cakeflow.forward import continuations
from cakeflow.journal import request_hash
from cakeflow.models import RoutedModule, Site

SITE = Site(3, "mlp_out")
QUIET = {"enable_progress_bar": False, "accelerator": "cpu", "logger": False}
FACTS = [
    EditRequest(
        "The first letter of {}", subject, new, true,
        probes=(Probe("paraphrase", f"In music, {subject}"), Probe("neighborhood", f"She walked along {subject}")),
    )
    for subject, new, true in (("Lund", "a", "the"), ("Australia", "the", "a"))
]  # fmt: skip


def side_memory(lm, oracle=True, **settings):
    shards = ShardSettings(activation="gelu_new", **settings)
    rule = LearningRule(lr=2.0, steps=4, margin=Margin(0.5, 4.0, 2.0), clamp=None)
    return SideMemory(
        lm, 3, shards=shards, rule=rule, density=0.5, contexts=Contexts(), irrelevant=["of the"], oracle=oracle
    )


def scores(module):
    """Log-probability of the expected continuation of each prompt, record by record."""
    return [each.expected_logprob for row in module.answers for each in row.prompts]


def under(lm, decisions, prompts, targets):
    """Log-probabilities with the module's decision replaced by hand, prompt by prompt."""
    module, results = lm.module(SITE), []
    for decision, prompt, target in zip(decisions, prompts, targets, strict=True):
        module.decide = lambda _, decision=decision: torch.full((1,), decision)
        results.append(float(score_targets(lm, [prompt], [target])[0]))
    del module.decide
    return results


def asked(facts=FACTS):
    rows = [((each.text, each.target_new), *each.probes) for each in facts]
    targets = [(each.target_new, each.target_true) for each in facts]
    return [
        pair
        for (text, near, far), (new, true) in zip(rows, targets, strict=True)
        for pair in (text, (near.prompt, new), (far.prompt, true))
    ]


def test_each_question_goes_to_the_shard_that_learned_its_fact(lm):
    """One shard per fact: the first is put away, the second is the last one put away."""
    editor = Editor(side_memory(lm, save_every=1, join_every=100, ratio=1e9), QUIET)
    result = editor.fit(FACTS, 1)
    assert result.protocol == "clean-v2+oracle"
    prompts, targets = zip(*asked(), strict=True)
    expected = under(lm, [2, 2, 0, 3, 3, 0], prompts, targets)
    assert scores(editor.module) == pytest.approx(expected, rel=1e-6)
    base = under(lm, [0] * 6, prompts, targets)
    assert abs(expected[0] - base[0]) > 1e-3
    assert [row.own for row in editor.module.routes(FACTS)] == [2, 2, 0, 3, 3, 0]
    assert [row.decision for row in editor.module.routes(FACTS)] == [0] * 6  # by itself it routes nothing there
    assert score_targets(lm, prompts, targets)[0].tolist() == pytest.approx(base, rel=1e-6)
    editor.rollback(1)
    editor.evaluate(FACTS)
    assert scores(editor.module) == pytest.approx(under(lm, [2, 2, 0, 0, 0, 0], prompts, targets), rel=1e-6)


def test_free_answers_of_an_evaluation_are_routed_too(lm):
    module = side_memory(lm, ratio=1e9)
    module.evaluation = Evaluation(protocol="wild", answer_tokens=4)
    editor = Editor(module, QUIET)
    editor.fit(FACTS, evaluate=False)
    texts = [each.prompts[0].answer for each in module.ask(FACTS).rows()]
    always = copy.deepcopy(lm)
    always.module(SITE).decide = lambda distances: torch.ones(distances.shape[-1:], dtype=torch.long)
    free = continuations(always, [fact.text for fact in FACTS], 4)
    assert (
        [text.strip() for text in texts]
        == [text.split("\n")[0].strip() for text in free]
        != [text.split("\n")[0].strip() for text in continuations(lm, [fact.text for fact in FACTS], 4)]
    )


def test_an_oracle_of_a_codebook(lm):
    module = CodebookMemory(lm, 3, codebook=CodebookSettings(1e-9), oracle=True)
    Editor(module, QUIET).fit(FACTS)
    plain = copy.deepcopy(lm)
    book = plain.module(SITE)
    prompts, targets = zip(*asked(), strict=True)
    expected = under(plain, [1, 1, 0, 2, 2, 0], prompts, targets)
    assert scores(module) == pytest.approx(expected, rel=1e-6)
    assert [row.decision for row in module.routes(FACTS)] == [1, 0, 0, 2, 0, 0]
    assert torch.equal(book.keys, lm.module(SITE).keys)


def test_without_an_oracle_the_memory_decides(lm):
    editor = Editor(side_memory(lm, oracle=False, control="never"), QUIET)
    result = editor.fit(FACTS)
    assert result.protocol == "clean-v2"
    assert result.before == result.after


def test_an_edited_prompt_counts_before_a_neighbor_and_the_later_fact_before_the_earlier(lm):
    twice = [FACTS[0], EditRequest("In music, {}", "Lund", "of", "in")]
    third = EditRequest("A {}", "letter", "a", "the", probes=(Probe("neighborhood", "The first letter of Lund"),))
    module = side_memory(lm, save_every=1, join_every=100)
    editor = Editor(module, QUIET)
    with pytest.warns(RequestWarning, match="contradict"):
        editor.fit(twice, 1, evaluate=False)
    ids = {prompt: tuple(lm.tokenizer(prompt)["input_ids"]) for prompt in (FACTS[0].text, "In music, Lund", "A letter")}
    named = module._own_answers([*twice, third], lm.module(SITE))
    assert [named[each] for each in ids.values()] == [2, 3, 0]
    assert learned(editor.journal) == [request_hash(fact) for fact in twice]


def test_a_prompt_that_ends_in_a_space_is_the_question_that_it_is(lm):
    """Scored with a target, its last token is a part of the target's first one."""
    fact = EditRequest("The first letter of {} ", "Lund", "a", "the")
    editor = Editor(side_memory(lm, ratio=1e9), QUIET)
    editor.fit([fact])
    expected = under(lm, [1], [fact.text], [fact.target_new])
    assert scores(editor.module) == pytest.approx(expected, rel=1e-6)
    assert abs(expected[0] - under(lm, [0], [fact.text], [fact.target_new])[0]) > 1e-3


def test_free_answers_are_forced_to_their_end_in_every_scope(lm):
    module = side_memory(lm, ratio=1e9, scope="sequence")
    module.evaluation = Evaluation(protocol="wild", answer_tokens=4)
    Editor(module, QUIET).fit(FACTS, evaluate=False)
    seen = []
    handle = lm.module(SITE).register_forward_hook(lambda each, *_: seen.append(each.decision.tolist()))
    module.ask(FACTS[:1])
    handle.remove()
    assert len(seen) > 2
    assert all(sorted(each) == sorted(seen[-1]) == [0, 1, 1] for each in seen[1:])


@pytest.mark.filterwarnings("ignore:records whose target_new")
def test_an_oracle_leaves_other_memories_alone(lm):
    """Their answers have other numbers, and they know other facts."""
    book = CodebookMemory(lm, 4, codebook=CodebookSettings(1e-9))
    Editor(book, QUIET).fit(FACTS[:1], evaluate=False)
    module = side_memory(lm, save_every=1, join_every=100, ratio=1e9)
    Editor(module, QUIET).fit(FACTS, 1)
    assert {row.place for row in module.routes(FACTS)} == {lm.architecture.path(SITE)}
    assert {row.place for row in book.routes(FACTS)} == {lm.architecture.path(book.site)}
    prompts, targets = zip(*asked(), strict=True)
    assert scores(module) == pytest.approx(under(lm, [2, 2, 0, 3, 3, 0], prompts, targets), rel=1e-6)


@pytest.mark.filterwarnings("ignore:records whose target_new")
def test_memories_that_decide_on_different_texts_are_refused(lm):
    Editor(CodebookMemory(lm, 4), QUIET).fit(FACTS[:1], evaluate=False)
    module, before = side_memory(lm, scope="sequence"), lm.module(SITE)
    with pytest.raises(ConfigError, match=r"c_proj decides with scope=sequence, and .*c_proj with scope=prompt; give"):
        Editor(module, QUIET).fit(FACTS, evaluate=False)
    assert lm.module(SITE) is before


def test_a_projection_has_one_memory(lm):
    Editor(side_memory(lm), QUIET).fit(FACTS[:1], evaluate=False)
    with pytest.raises(ArchitectureError, match=r"a ShardedProjection is in the place of .* take the memory back"):
        Editor(CodebookMemory(lm, 3), QUIET).fit(FACTS[:1], evaluate=False)


class Watch(RoutedModule):
    """Notes on how many tokens a memory would decide."""

    def __init__(self, base):
        super().__init__("prompt")
        self.base, self.lengths = base, []

    def forward(self, inputs):
        self.lengths += self.rows_of(inputs).mask(inputs.device).sum(1).tolist()
        return self.base(inputs)


@pytest.mark.parametrize("kind", ["shards", "codebook", "factors"])
def test_while_a_memory_learns_the_others_decide_on_prompts(lm, kind):
    """Neither on answers nor on padding."""
    assert (lm.places_tokens, lm.tuple_size) == (True, 0)  # a few short passes show this
    for layer in (1, 5):
        lm.put(lm.architecture.path(Site(layer, "mlp_out")), Watch(lm.module(Site(layer, "mlp_out"))))
    modules = {
        "shards": lambda: side_memory(lm, oracle=False),
        "codebook": lambda: CodebookMemory(lm, 3),
        "factors": lambda: FactorMemory(lm, 4, "mlp.c_fc", 1, FactorTraining(steps=2)),
    }
    longer = EditRequest("In music, a violin has four strings in {}", "Old Malmö", "of the", "in")
    Editor(modules[kind](), QUIET).fit([FACTS[0], longer], evaluate=False)
    expected = {len(lm.tokenizer(text)["input_ids"]) for text in (FACTS[0].text, longer.text, "of the")}
    for layer in (1, 5):
        lengths = lm.module(Site(layer, "mlp_out")).lengths
        assert lengths
        assert set(lengths) <= expected


@pytest.mark.filterwarnings("ignore:records whose target_new")
def test_weights_are_not_edited_below_or_above_a_memory(lm):
    """The search runs parts of texts, of which the memory would route each anew."""
    Editor(side_memory(lm), QUIET).fit(FACTS[:1], evaluate=False)
    with pytest.raises(
        ArchitectureError, match=r"h\.3\.mlp\.c_proj: a memory routes whole texts there.* edit the weights"
    ):
        Editor(module_of(lm, layers=[1], moments={}), QUIET)


@pytest.mark.parametrize("layer", [6, 99, -7])
def test_a_block_that_is_not_there_is_refused(lm, layer):
    for method in (SideMemory, CodebookMemory, FactorMemory):
        with pytest.raises(
            ConfigError, match=f"layer {layer} is not in the model, which has blocks 0 to 5, or -6 to -1"
        ):
            Editor(method(lm, layer), QUIET)
    Editor(CodebookMemory(lm, -6), QUIET)


def test_decisions_on_tokens_have_no_oracle(lm):
    with pytest.raises(ConfigError, match="decisions on single tokens cannot be forced"):
        side_memory(lm, scope="token")
