"""The official protocol against a plain transcription of what the official code does, one prompt at a time."""

import pytest
import torch
from tokenizers import Regex, normalizers, processors

from cakeflow import EditRequest, Probe
from cakeflow.errors import ConfigError
from cakeflow.evaluation import Evaluation, official_token_reads
from cakeflow.evaluation.scoring import score_records, scored_prompts
from cakeflow.metrics import KINDS

RECORDS = [
    EditRequest(
        "{} is in",
        "Lund",
        "Peru, far away",
        "Sweden",
        (
            Probe("paraphrase", "You find Lund in"),
            Probe("neighborhood", "nq question: where is Oslo?", "Norway, of course"),
            Probe("neighborhood", "Malmö is in"),
        ),
    ),
    EditRequest("Who wrote {}?", "日本書紀", "東京 🚀", probes=(Probe("paraphrase", "By whom is 日本書紀?"),)),
]


@pytest.fixture(params=["plain", "front"])
def asked(request, tiny):
    """A model whose tokenizer adds nothing, and one whose tokenizer puts a special token in front."""
    if request.param == "front":
        tokenizer = tiny.tokenizer
        name, number = tokenizer.eos_token, tokenizer.eos_token_id
        front = processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, number)])
        tokenizer.backend_tokenizer.post_processor = front
        assert tokenizer("a")["input_ids"][0] == number
    return tiny


@torch.no_grad()
def likelihood(lm, prompt, target):
    """Mean log-probability, and whether all is right: target tokens alone, looked up where the prompt alone ends."""
    front = lm.tokenizer("")["input_ids"]
    ids = lm.tokenizer(f"{prompt} {target}")["input_ids"]
    labels = lm.tokenizer(f" {target}")["input_ids"][len(front) :]
    logits = lm.model(torch.tensor([ids])).logits[0].double()
    start = len(lm.tokenizer(prompt)["input_ids"])
    rows = [logits[start + place - 1] for place in range(len(labels))]
    each = [float(row.log_softmax(-1)[label]) for row, label in zip(rows, labels, strict=True)]
    right = [int(row.argmax()) == label for row, label in zip(rows, labels, strict=True)]
    return sum(each) / len(each), all(right)


@torch.no_grad()
def accuracy(lm, prompt, target, neighborhood):
    """Share of right tokens: each asked after the decoded ones before it."""
    front = lm.tokenizer("")["input_ids"]
    ids = lm.tokenizer(f" {target}")["input_ids"]
    ids = ids if neighborhood else ids[len(front) :]
    right = []
    for place, token in enumerate(ids):
        read = lm.tokenizer(prompt + lm.tokenizer.decode(ids[:place]))["input_ids"]
        label = lm.tokenizer(lm.tokenizer.decode([token]), add_special_tokens=False)["input_ids"][0]
        right.append(int(lm.model(torch.tensor([read])).logits[0, -1].argmax()) == label)
    return sum(right) / len(right)


def test_official_numbers(asked):
    result = score_records(asked, RECORDS, "official")
    for place, question in enumerate(scored_prompts(RECORDS)):
        mean, right = likelihood(asked, question.prompt, question.expected)
        assert float(result.expected[place]) == pytest.approx(mean, abs=1e-5)
        assert bool(result.correct[place]) == right
        assert bool(result.rival[place].isnan()) == (question.rival is None)
        if question.rival is not None:
            mean, _ = likelihood(asked, question.prompt, question.rival)
            assert float(result.rival[place]) == pytest.approx(mean, abs=1e-5)
        share = accuracy(asked, question.prompt, question.expected, KINDS[question.kind] == "neighborhood")
        assert float(result.tokens[place]) == pytest.approx(share)


def test_protocols_differ_where_tokens_join(tiny):
    """A target that begins with a space of its own gets another one in the official protocol."""
    record = EditRequest("{} is in", "Lund", "Peru")
    probe = Probe("paraphrase", "Lund is in ")
    spaced = EditRequest("{} is in", "Lund", "Peru", probes=(probe,))
    assert torch.equal(
        score_records(tiny, [record], "clean").expected, score_records(tiny, [record], "official").expected
    )
    clean, official = (score_records(tiny, [spaced], protocol).expected for protocol in ("clean", "official"))
    assert abs(float(clean[1] - official[1])) > 1e-3


def test_unknown_protocol():
    with pytest.raises(ConfigError, match="protocol must be one of clean, official, wild, wild_official, got 'mine'"):
        Evaluation(protocol="mine")


@pytest.mark.parametrize("protocol", ["clean", "official"])
def test_an_end_of_text_token_behind_every_text_changes_no_score(tiny, protocol):
    expected = score_records(tiny, RECORDS, protocol)
    name, number = tiny.tokenizer.eos_token, tiny.tokenizer.eos_token_id
    tiny.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {name}", special_tokens=[(name, number)]
    )
    assert tiny.tokenizer("a")["input_ids"][-1] == number
    scores = score_records(tiny, RECORDS, protocol)
    for field in ("expected", "rival", "tokens", "correct"):
        assert torch.equal(getattr(scores, field).nan_to_num(9), getattr(expected, field).nan_to_num(9))


@pytest.mark.parametrize("protocol", ["clean", "official"])
def test_a_tokenizer_may_have_no_end_of_text_token(tiny, protocol):
    """Not even where a token of the official protocol reads back as none: it is left out."""
    records = [EditRequest("{} is in", "Lund", "Peru \u200b far")]
    tiny.tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" \u200b", "")
    tiny.tokenizer.eos_token = None
    assert score_records(tiny, records, protocol).expected.isfinite().all()


def test_official_tokens_that_read_back_as_none(tiny):
    """The official code takes the end-of-text token for them; where there is none, nothing is asked."""
    tokenizer = tiny.tokenizer
    ids = tokenizer(" Peru far", add_special_tokens=False)["input_ids"]
    last = tokenizer.decode(ids[-1:])
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(f"^{last}$"), "")
    (reads,) = official_token_reads(tokenizer, ["Lund is in"], ["Peru far"], [False])
    assert reads[-1][1] == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert official_token_reads(tokenizer, ["Lund is in"], ["Peru far"], [False]) == [reads[:-1]]
