"""Where facts are written: the named tokens, and what a massive activation leaves free."""

from dataclasses import replace

import pytest
import torch

from cakeflow import Contexts, EditRequest, GradientSearch
from cakeflow.errors import ConfigError, RequestError
from cakeflow.forward.fact_tokens import MASSIVE, check_tokens, choose_tokens, relative_norms, with_end
from cakeflow.forward.keys import FactReader
from cakeflow.forward.tokens import encode_batch
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture

CONTEXTS = Contexts((("{}",), ("I am. {}", "The sky is. {}")))
SHORT = EditRequest("{} plays", "A", "tennis")
"""A subject of one token at the start of the prompt."""


@pytest.fixture
def massive(lm):
    """A model whose first position has a massive activation, as models without a beginning-of-text token have."""
    with torch.no_grad():
        lm.model.transformer.wpe.weight[0] *= 200
    return lm


def full(lm, row, site, side):
    """Input or output of a module at a row's token, from a full pass."""
    with torch.no_grad(), capture(lm, [site], side=side) as seen:
        lm.model(input_ids=torch.tensor([row.ids]), use_cache=False)
    return seen[site][0, row.fact]


@pytest.mark.parametrize(
    ("token", "place"),
    [
        ("subject_last", lambda row: row.subject),
        ("subject_first", lambda row: row.start),
        ("after_subject", lambda row: row.subject + 1),
        ("prompt_last", lambda row: row.target - 1),
    ],
)
def test_named_tokens(lm, requests, token, place):
    some = [request for request in requests if not request.prompt.endswith("{}")]
    texts = encode_batch(lm, some, CONTEXTS)
    batch = choose_tokens(lm, texts, token, 1)
    assert batch.owners == list(range(len(some)))
    for rows, before in zip(batch.texts.rows, texts.rows, strict=True):
        assert [row.fact for row in rows] == [place(row) for row in before]
        assert [row.ids for row in rows] == [row.ids for row in before]
    assert batch.texts.weights == texts.weights
    own = [replace(request, fact_token=token) for request in some]
    assert repr(choose_tokens(lm, encode_batch(lm, own, CONTEXTS), "auto", 1).texts.rows) == repr(batch.texts.rows)


def test_a_request_without_such_a_token_is_refused(lm):
    texts = encode_batch(lm, [SHORT, EditRequest("I live in {}", "Rome", "Paris")], CONTEXTS, first=7)
    with pytest.raises(RequestError, match=r"8.*fact_token.*no token between subject and target"):
        check_tokens(texts, "after_subject")


def test_ordinary_facts_are_written_at_the_subjects_last_token(tiny, requests):
    texts = encode_batch(tiny, requests, CONTEXTS)
    batch = choose_tokens(tiny, texts, "auto", 1)
    assert repr(batch.texts) == repr(texts)
    assert batch.massive == (None,) * len(requests)


def test_norms_are_those_of_full_passes(massive, requests):
    texts = encode_batch(massive, requests[:3], CONTEXTS)
    rows = [row for entry in texts.rows for row in entry]
    plain = []
    for row in rows:
        with torch.no_grad(), capture(massive, [Site(1)]) as seen:
            massive.model(input_ids=torch.tensor([row.ids[: row.target]]), use_cache=False)
        plain.append(seen[Site(1)][0].norm(dim=1).float())
    middle = torch.cat([norm[1:] for norm in plain]).median()
    measured = [norm for entry in relative_norms(massive, texts, 2, max_tokens=40) for norm in entry]
    for norm, expected in zip(measured, plain, strict=True):
        torch.testing.assert_close(norm, expected / middle, rtol=1e-5, atol=0)


def test_a_massive_token_is_left_out_context_by_context(massive, requests):
    texts = encode_batch(massive, [requests[0], SHORT, requests[1]], CONTEXTS, first=4)
    batch = choose_tokens(massive, texts, "auto", 2)
    assert batch.owners == [0, 1, 1, 2]
    assert batch.texts.numbers == (4, 5, 5, 6)
    bare, behind = batch.texts.rows[1:3]
    assert [row.offset for row in (*bare, *behind)] == [1, 0, 0]
    assert [row.ids for row in (*bare, *behind)] == [row.ids for row in texts.rows[1]]
    assert batch.texts.weights[1:3] == ((1.0,), (0.5, 0.5))
    neutral = batch.texts.essence[1:3]
    assert neutral[0].ids == texts.essence[1].ids
    assert neutral[0].fact == neutral[0].subject + 1
    assert neutral[1].ids[: neutral[1].fact + 1] == behind[0].ids[: behind[0].fact + 1]
    assert batch.massive == (None, None, None)
    for part, entries in ((batch.part([1]), [1, 2]), (batch.part([0, 2]), [0, 3])):
        assert repr(part.texts) == repr(batch.texts.part(entries))
        assert part.owners == [0, 0] if len(part) == 1 else [0, 1]


def test_a_fact_without_a_free_token_is_marked(massive):
    only = EditRequest("{}", "A", "tennis")
    batch = choose_tokens(massive, encode_batch(massive, [only, EditRequest("{} is", "I", "x")], Contexts()), "auto", 2)
    assert batch.massive[0] > MASSIVE
    assert batch.massive[1] is None
    assert batch.texts.rows[0][0].offset == 0


def test_keys_and_values_are_read_at_the_chosen_tokens(massive, requests):
    batch = choose_tokens(massive, encode_batch(massive, [requests[0], SHORT], CONTEXTS), "auto", 2).texts
    keys, first, values = FactReader(massive, batch).read(Site(3, "mlp_out"), Site(4))
    for i, (rows, weights) in enumerate(zip(batch.rows, batch.weights, strict=True)):
        each = [full(massive, row, Site(3, "mlp_out"), "in") for row in rows]
        mean = sum(weight * key for weight, key in zip(weights, each, strict=True))
        torch.testing.assert_close(keys[i], mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(first[i], each[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(values[i], full(massive, rows[0], Site(4), "out"), rtol=0, atol=1e-9)


def test_entries_are_searched_as_facts_of_their_own(massive, requests):
    batch = choose_tokens(massive, encode_batch(massive, [requests[0], SHORT], CONTEXTS), "auto", 2).texts
    search = GradientSearch(steps=5, lr=0.3)
    together = search.search(massive, batch, 4)
    for i in range(len(batch)):
        alone = search.search(massive, batch.part([i]), 4)
        torch.testing.assert_close(together.values[i], alone.values[0], rtol=0, atol=1e-8)
    assert float((together.values[1] - together.values[2]).abs().max()) > 0.1


@pytest.mark.real
def test_the_gap_of_the_real_model(smollm2):
    """The embedded model has no token for the beginning of a text: its first tokens are massive, and a few others."""
    free = [
        EditRequest("{} plays the sport of", "LeBron James", "x"),
        EditRequest("The capital of {} is", "France", "x"),
    ]
    blocked = [
        EditRequest("{} was founded by", "Google", "x"),
        EditRequest("{} follows the religion of", "Malcolm X", "x"),
        EditRequest("{} was a native speaker of", "Max Jacob", "x"),
    ]
    contexts = Contexts.of(["{}", "I was told that. {}"])
    texts = encode_batch(smollm2, free + blocked, contexts)
    norms = torch.cat([norm for entry in relative_norms(smollm2, texts, 5) for norm in entry])
    assert not bool(((norms > 2) & (norms < 3)).any())
    batch = choose_tokens(smollm2, texts, "auto", 5)
    assert [[row.offset for row in rows] for rows in batch.texts.rows[:2]] == [[0, 0], [0, 0]]
    for i in (2, 3, 4):
        assert batch.texts.rows[batch.owners.index(i)][0].offset > 0
    assert batch.massive == (None,) * 5


CHATS = replace(CONTEXTS, chats=("<user> {}\n", "<user> Hi\n<user> {}\n"))


def test_a_fact_has_a_key_of_its_own_in_a_chat(tiny, requests):
    texts = encode_batch(tiny, requests[:3], CHATS)
    batch = choose_tokens(tiny, texts, "auto", 1, keys=CHATS.keys)
    assert batch.owners == [0, 0, 1, 1, 2, 2]
    plain = choose_tokens(tiny, encode_batch(tiny, requests[:3], CONTEXTS), "auto", 1).texts
    for i, rows in enumerate(texts.rows):
        outside, inside = batch.texts.rows[2 * i], batch.texts.rows[2 * i + 1]
        assert outside == plain.rows[i] == rows[:3]
        assert inside == rows[3:]
        assert batch.texts.weights[2 * i : 2 * i + 2] == (CONTEXTS.weights, (0.5, 0.5))
    reader = FactReader(tiny, batch.texts)
    keys, _, values = reader.read(Site(2, "mlp_out"), Site(3))
    for i, rows in enumerate(batch.texts.rows):
        each = [full(tiny, row, Site(2, "mlp_out"), "in") for row in rows]
        mean = sum(weight * key for weight, key in zip(batch.texts.weights[i], each, strict=True))
        assert torch.allclose(keys[i], mean.double(), rtol=0, atol=1e-5)
        assert torch.allclose(values[i], full(tiny, rows[0], Site(3), "out").double(), rtol=0, atol=1e-5)


def test_a_named_token_has_a_key_of_its_own_in_a_chat_too(lm, requests):
    batch = choose_tokens(lm, encode_batch(lm, requests[:1], CHATS), "prompt_last", 1, keys=CHATS.keys)
    assert batch.owners == [0, 0]
    assert all(row.fact == row.target - 1 for rows in batch.texts.rows for row in rows)


def test_a_blocked_fact_in_chats_has_three_entries(massive, requests):
    batch = choose_tokens(massive, encode_batch(massive, [SHORT], CHATS), "auto", 2, keys=CHATS.keys)
    assert [[row.offset for row in rows] for rows in batch.texts.rows] == [[1], [0, 0], [0, 0]]
    assert batch.texts.value_groups() == [0, 1, 1]


def test_the_neutral_prompt_stands_in_the_chat_as_well(lm, requests):
    batch = choose_tokens(lm, encode_batch(lm, requests[:1], CHATS), "auto", 1, keys=CHATS.keys).texts
    essence, first = batch.essence[1], batch.rows[1][0]
    assert essence.ids[: first.subject + 1] == first.ids[: first.subject + 1]
    assert essence.ids[first.subject + 1 :] == batch.essence[0].ids[batch.essence[0].subject + 1 :]


def test_targets_that_end_have_the_end_of_text_as_their_last_token(lm):
    texts = encode_batch(lm, [EditRequest("{} lives in", "Ann", "Rome"), EditRequest("{} is", "Bo", "ill")], Contexts())
    ended = with_end(lm, texts)
    for before, after in zip(texts.rows, ended.rows, strict=True):
        assert [(*row.ids, lm.tokenizer.eos_token_id) for row in before] == [row.ids for row in after]
        assert [(row.subject, row.target) for row in before] == [(row.subject, row.target) for row in after]
    assert (ended.essence, ended.weights, ended.numbers) == (texts.essence, texts.weights, texts.numbers)


def test_a_target_without_room_or_a_tokenizer_without_an_end_is_refused(lm, monkeypatch):
    texts = encode_batch(lm, [EditRequest("{} lives in", "Ann", "Rome")], Contexts())
    monkeypatch.setattr(type(lm), "longest", len(texts.rows[0][0].ids))
    with pytest.raises(RequestError, match="with the end of the text; shorten it"):
        with_end(lm, texts)
    lm.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="set end_of_text to false"):
        with_end(lm, texts)
