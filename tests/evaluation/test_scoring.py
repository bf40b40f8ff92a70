"""Scores: the batched, padded pass with narrowed logits equals one plain forward pass per prompt."""

import dataclasses

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cakeflow import EditRequest, Probe, RequestError
from cakeflow.data import builtin_facts
from cakeflow.evaluation.scoring import check_records, score_records, score_targets, scored_prompts
from cakeflow.metrics import KINDS

PROMPTS = ["The capital of Peru is", "A", "日本の首都は", "It is said that a very long sentence about the sea"]
PROMPTS += ["Who is ", "The sign 🙂 means", "Rome, Rome, Rome is called '"]
TARGETS = ["Lima, the city of kings", "b", "東京", "ends", "nobody", "🚀", "eternal"]
GAPS = [" ", " ", "", " ", "", " ", ""]
"""What a writer puts between them."""


@torch.no_grad()
def plainly(lm, prompt, target, gap=" "):
    """Mean log-probability and correctness from one unpadded pass; the prompt's tokens are counted on their own."""
    text = prompt + gap + target
    ids, start = lm.tokenizer(text)["input_ids"], len(lm.tokenizer(prompt.rstrip())["input_ids"])
    assert lm.tokenizer.decode(ids[start:]).strip() == target
    logits = lm.model(torch.tensor([ids])).logits[0, start - 1 : -1].double()
    expected = torch.tensor(ids[start:])
    each = logits.log_softmax(-1).gather(1, expected[:, None])
    return float(each.mean()), float((logits.argmax(-1) == expected).double().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("max_tokens", [1, 60, 8192])
def test_scores_equal_one_plain_pass_per_prompt(tiny, dtype, max_tokens):
    tiny.model.to(dtype)
    scores, share = score_targets(tiny, PROMPTS, TARGETS, max_tokens)
    expected, hits = zip(*(plainly(tiny, *pair) for pair in zip(PROMPTS, TARGETS, GAPS, strict=True)), strict=True)
    torch.testing.assert_close(scores.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)
    assert share.tolist() == pytest.approx(hits)


def greedy(lm, prompt, tokens):
    """A continuation whose every token is the most likely one, as text that tokenises back to itself."""
    ids = lm.tokenizer(prompt)["input_ids"]
    for _ in range(tokens):
        ids = [*ids, int(lm.model(torch.tensor([ids])).logits[0, -1].argmax())]
    return lm.tokenizer.decode(ids)


def test_correct_needs_every_token(tiny):
    """Of the model's own continuation all tokens are right; with the last word changed only some are."""
    head = torch.nn.Linear(tiny.head.in_features, tiny.head.out_features, dtype=tiny.dtype)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    (token,) = tiny.tokenizer(" the")["input_ids"]
    head.bias.data[token] = 9.0
    tiny.model.set_output_embeddings(head)
    assert greedy(tiny, "The sea is", 3) == "The sea is the the the"
    scores, share = score_targets(tiny, ["The sea is"] * 4, ["the the the", "the the a", "a the", "the"])
    assert share.tolist() == pytest.approx([1, 2 / 3, 1 / 2, 1])
    all_right, last_wrong, _, one = scores.tolist()
    assert all_right == pytest.approx(one, abs=1e-6)
    assert last_wrong == pytest.approx(one - 9 / 3, abs=1e-5)


def test_scoring_leaves_the_model_alone(tiny):
    before = tiny.fingerprint()
    score_targets(tiny, PROMPTS, TARGETS)
    assert tiny.fingerprint() == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.model.modules())
    assert all(parameter.grad is None for parameter in tiny.model.parameters())


FULL = EditRequest(
    "{} is in",
    "Lund",
    "Peru",
    "Sweden",
    (
        Probe("paraphrase", "You find Lund in"),
        Probe("neighborhood", "Malmö is in"),
        Probe("generation", "Lund is known for"),
        Probe("neighborhood", "Oslo is in", "Norway"),
        Probe("paraphrase", "Lund belongs to", "the land of Peru"),
    ),
)
PROBES = (
    Probe("neighborhood", "Pori is in", "Finland"),
    Probe("neighborhood", "Vasa is in"),
    Probe("paraphrase", "In"),
)
BARE = EditRequest("{} is in", "Turku", "Chile", probes=PROBES)
ASKED = [
    (0, "rewrite", "Lund is in", "Peru", "Sweden"),
    (0, "paraphrase", "You find Lund in", "Peru", "Sweden"),
    (0, "neighborhood", "Malmö is in", "Sweden", "Peru"),
    (0, "neighborhood", "Oslo is in", "Norway", "Peru"),
    (0, "paraphrase", "Lund belongs to", "the land of Peru", "Sweden"),
    (1, "rewrite", "Turku is in", "Chile", None),
    (1, "neighborhood", "Pori is in", "Finland", None),
    (1, "paraphrase", "In", "Chile", None),
]
"""Record, kind, prompt, wanted and rival of all prompts of FULL and BARE that can be scored (Vasa has no answer)."""


def test_records_become_prompts_in_order(tiny):
    result = score_records(tiny, [FULL, BARE])
    assert result.record.tolist() == [record for record, *_ in ASKED]
    assert [KINDS[kind] for kind in result.kind] == [kind for _, kind, *_ in ASKED]
    for i, (_, _, prompt, expected, rival) in enumerate(ASKED):
        score, share = plainly(tiny, prompt, expected)
        assert float(result.expected[i]) == pytest.approx(score, abs=1e-5)
        assert (float(result.tokens[i]), bool(result.correct[i])) == (pytest.approx(share), share == 1)
        if rival is None:
            assert result.rival[i].isnan()
        else:
            assert float(result.rival[i]) == pytest.approx(plainly(tiny, prompt, rival)[0], abs=1e-5)


def test_records_score_alike_alone_and_together(tiny):
    records = builtin_facts()[:6]
    together = score_records(tiny, records)
    for index, record in enumerate(records):
        alone, mine = score_records(tiny, [record]), together.record == index
        torch.testing.assert_close(together.expected[mine], alone.expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(together.rival[mine], alone.rival, rtol=0, atol=1e-5)
        assert torch.equal(together.correct[mine], alone.correct)


def test_tokenizer_padding_side_does_not_matter(lm):
    expected = score_records(lm, [FULL])
    lm.tokenizer.padding_side = "left"
    assert torch.equal(score_records(lm, [FULL]).expected, expected.expected)


def test_prompts_that_are_too_long_are_refused(lm):
    limit = lm.model.config.max_position_embeddings
    probe = Probe("paraphrase", "word " * limit + "is")
    with pytest.raises(RequestError, match="longer than the model"):
        score_records(lm, [EditRequest("{} is", "Lund", "Peru", probes=(probe,))])


@pytest.mark.parametrize("targets", [["☃"], ["big", "☃"]])
def test_targets_without_a_token_are_refused(lm, targets):
    """Not scored as certain."""
    backend = lm.tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Replace("☃", ""), normalizers.Strip()])
    with pytest.raises(RequestError, match="no token of its own"):
        score_records(lm, [EditRequest("{} is", "Lund", target) for target in targets])


def test_every_record_that_cannot_be_asked_is_named_by_its_place(lm, monkeypatch):
    """Whatever part it is checked in, and a target that several prompts share once."""
    monkeypatch.setattr("cakeflow.evaluation.scoring.CHECK_SIZE", 2)
    backend = lm.tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Replace("☃", ""), normalizers.Strip()])
    long = "word " * lm.longest + "is"
    records = [
        EditRequest("{} is", "Lund", "big", "☃", (Probe("neighborhood", "Rome is"), Probe("paraphrase", "It is"))),
        EditRequest("{} is", "Lund", "big", "old", (Probe("neighborhood", "Rome is", "☃☃"),)),
        EditRequest("{} is", "Lund", "big", "old", (Probe("generation", long),)),
        EditRequest("{} is", "Lund", "☃", None, (Probe("paraphrase", "It is"), Probe("paraphrase", "Rome is"))),
        EditRequest("{} is", "Lund", "big", "old", (Probe("paraphrase", long), Probe("generation", long))),
    ]
    expected = [(0, "target_true"), (1, "probes.expected"), (3, "target_new"), (4, "probes.prompt")]
    with pytest.raises(RequestError) as caught:
        check_records(lm, records)
    assert [(problem.index, problem.field) for problem in caught.value.faults] == expected
    for protocol in ("clean", "official"):
        with pytest.raises(RequestError) as caught:
            score_records(lm, [records[2], records[1]], protocol)
        assert [(problem.index, problem.field) for problem in caught.value.faults] == [(1, "probes.expected")]
    check_records(lm, [records[2]])


@pytest.mark.real
def test_real_model_equals_plain_passes(smollm2):
    records = builtin_facts()[:3]
    result = score_records(smollm2, records)
    asked = [(r.text, r.target_new) for r in records]
    mine = result.expected[result.kind == KINDS.index("rewrite")]
    expected = torch.tensor([plainly(smollm2, *pair)[0] for pair in asked])
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-4)


def test_the_space_of_a_request_holds_for_all_its_prompts(tiny):
    probes = (Probe("paraphrase", "You find Lund in"), Probe("neighborhood", "Malmö is in"))
    record = EditRequest("{} is in", "Lund", "Peru", "Sweden", probes, space=False)
    scores = score_records(tiny, [record])
    for place, (_, _, prompt, expected, rival) in enumerate(scored_prompts([record])):
        score, _ = plainly(tiny, prompt, expected, "")
        assert float(scores.expected[place]) == pytest.approx(score, abs=1e-5)
        assert float(scores.rival[place]) == pytest.approx(plainly(tiny, prompt, rival, "")[0], abs=1e-5)


def test_tokens_that_the_model_has_not_are_refused_before_anything_is_scored(lm):
    lm.tokenizer.add_tokens(["<ent>"])
    records = [
        EditRequest("{} is in", "Lund", "<ent>"),
        EditRequest("{} is", "Lund", "old", probes=(Probe("neighborhood", "Malmö is", "<ent>"),)),
        EditRequest("{} is", "Lund", "old", probes=(Probe("paraphrase", "The <ent> is"),)),
        EditRequest("{} is", "Lund", "old", probes=(Probe("generation", "The <ent> is"),)),
        EditRequest("{} is", "Lund", "old"),
    ]
    with pytest.raises(RequestError, match="has the token '<ent>', number 600") as caught:
        check_records(lm, records)
    assert {(fault.index, fault.field) for fault in caught.value.faults} == {
        (0, "target_new"),
        (1, "probes.expected"),
        (2, "probes.prompt"),
        (3, "probes.prompt"),
    }


def test_a_continuation_that_the_tokenizer_does_not_know_is_refused(lm):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "Lund": 1, "is": 2, "old": 3, "new": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    lm = dataclasses.replace(lm, tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    records = [EditRequest("{} is", "Lund", "old"), EditRequest("{} is", "Lund", "new", "very old")]
    with pytest.raises(RequestError, match="does not know 'very', which becomes <unk>") as caught:
        check_records(lm, records)
    assert [(fault.index, fault.field) for fault in caught.value.faults] == [(1, "target_true")]
