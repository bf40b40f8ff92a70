"""Balls of a codebook, counted by hand, and that its answers depend on the prompt alone."""

import copy

import pytest
import torch
from cakeflow_sidememory import Codebook, CodebookSettings, fold
from cakeflow_sidememory.codebook import GAP, REACH, Balls, rows_of_table, table
from hypothesis import given, settings
from hypothesis import strategies as st

from cakeflow.errors import ConfigError, ShapeError
from cakeflow.forward import continuations, encode_texts, pad
from cakeflow.models import Site, prompt_lengths

SITE = Site(2, "mlp_out")
TEXTS = ["The first letter", "She walked along the river", "of the", "In music, a violin has four strings", "Rome"]


def keys(*places):
    """Keys on a line."""
    return torch.tensor([[place, 0.0] for place in places], dtype=torch.float64)


def balls(places, labels, eps=1.0):
    result = fold(keys(*places), [(label,) for label in labels], eps)
    return result.radius.tolist(), result.owner.tolist()


@pytest.mark.parametrize(
    ("places", "labels", "radius", "owner"),
    [
        ([0, 5], "ab", [1, 1], [0, 1]),  # far apart
        ([0, 2.0001], "aa", [1, 1], [0, 1]),  # just farther than eps and the radius
        ([0, 2], "aa", [2, -1], [0, 0]),  # the ball grows to reach the key
        ([0, 0.5], "aa", [1, -1], [0, 0]),  # inside already
        ([0, 1.5], "ab", [0.75 - GAP, 0.75], [0, 1]),  # split
        ([0, 2, 2.5], "aaa", [2.5, -1, -1], [0, 0, 0]),  # grows again, from the center
        ([0, 2, 2.5], "aab", [1.25 - GAP, -1, 1.25], [0, 0, 2]),  # split of a grown ball
        ([0, 3, 1.6], "aba", [1, 0.7 - GAP, 0.7], [0, 1, 2]),  # the nearest one decides, not the one of its label
        ([0, 0], "ab", [-1, 1], [-1, 1]),  # one key: the later fact takes the place
        ([0, 2, 0], "aab", [-1, -1, 2], [-1, 2, 2]),  # and the ball, with what else it holds
        ([0, 0], "aa", [1, -1], [0, 0]),
    ],
)
def test_balls_by_hand(places, labels, radius, owner):
    result = balls(places, [ord(each) for each in labels])
    assert result[1] == owner
    assert result[0] == pytest.approx(radius, abs=1e-15)


points = st.lists(
    st.tuples(st.integers(-6, 6).map(lambda n: n / 2), st.integers(0, 2)), min_size=1, max_size=12
)  # many at equal distances and at one place


@given(points, st.data())
def test_balls_are_the_same_in_parts(facts, data):
    """To go on from earlier balls is to begin anew, to the bit."""
    places, labels = keys(*(place for place, _ in facts)), [(label,) for _, label in facts]
    whole = fold(places, labels, 1.0)
    cut = data.draw(st.integers(0, len(facts)))
    part = fold(places, labels, 1.0, fold(places[:cut], labels[:cut], 1.0))
    assert torch.equal(whole.radius, part.radius)
    assert torch.equal(whole.owner, part.owner)


@given(points)
def test_no_key_is_in_a_ball_of_another_label_unless_it_was_outvoted(facts):
    """Where nothing was split or replaced after it, a key answers for itself; a ball's keys share its label."""
    places, labels = keys(*(place for place, _ in facts)), [label for _, label in facts]
    result = fold(places, [(label,) for label in labels], 1.0)
    centers = [i for i, owner in enumerate(result.owner.tolist()) if owner == i]
    assert (result.radius[centers] >= 0).all()
    last = len(facts) - 1
    assert int(result.owner[last]) >= 0
    assert torch.equal(result.owner[result.owner >= 0], result.owner[result.owner[result.owner >= 0]])
    own = places[int(result.owner[last])]
    assert float((places[last] - own).norm()) <= float(result.radius[int(result.owner[last])])


def test_labels_in_a_table():
    rows = [(3, 4), (), (5,)]
    assert rows_of_table(table(rows)) == rows
    assert table([]).shape == (0, 0)


# ---- in a model ----


def key_of(lm, text):
    book = Codebook.around(lm.module(SITE), CodebookSettings())
    base, caught = book.base, []
    handle = base.register_forward_pre_hook(lambda _, args: caught.append(args[0][0, -1]))
    (ids,) = encode_texts(lm.tokenizer, [text])
    with torch.no_grad():
        lm(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    return caught[0]


def with_book(lm, texts, eps):
    result = torch.stack([key_of(lm, text) for text in texts])
    values = torch.randn(len(texts), lm.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    book = Codebook.around(lm.module(SITE), CodebookSettings(eps)).grown(
        result, values, [(i,) for i in range(len(texts))]
    )
    lm.put(lm.architecture.path(SITE), book)
    return book


@pytest.fixture(scope="module")
def book_lm(_models):
    lm = copy.deepcopy(_models["llama"])
    with_book(lm, TEXTS[:3], 1e-6)
    return lm


def answers(lm, texts, side="right"):
    """Logits behind the prompt, one batch."""
    rows = encode_texts(lm.tokenizer, texts)
    width = max(map(len, rows))
    spaces = [[0] * (width - len(row)) for row in rows]
    order = (lambda row, space: [*space, *row]) if side == "left" else (lambda row, space: [*row, *space])
    ids = torch.tensor([order(row, space) for row, space in zip(rows, spaces, strict=True)])
    mask = torch.tensor([order([1] * len(row), space) for row, space in zip(rows, spaces, strict=True)])
    with torch.no_grad():
        logits = lm(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    last = [len(row) - 1 if side == "right" else width - 1 for row in rows]
    return logits[torch.arange(len(rows)), last], lm.module(SITE).decision.tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=6), st.sampled_from(["left", "right"]))
def test_neither_batch_nor_padding_decides(book_lm, texts, side):
    together, decided = answers(book_lm, texts, side)
    assert decided == [TEXTS.index(text) + 1 if text in TEXTS[:3] else 0 for text in texts]
    alone = torch.cat([answers(book_lm, [text])[0] for text in texts])
    torch.testing.assert_close(together, alone)


def test_the_value_stands_at_the_last_token_of_the_prompt_and_nowhere_else(tiny):
    plain = copy.deepcopy(tiny)
    book = with_book(tiny, TEXTS[:1], 1e-6)
    rows = encode_texts(tiny.tokenizer, [TEXTS[0], TEXTS[0] + " of Rome"])
    ids, outputs = torch.tensor([rows[1]]), []
    handle = book.register_forward_hook(lambda _m, _a, out: outputs.append(out))
    with torch.no_grad(), prompt_lengths(tiny.model, torch.tensor([len(rows[0])])):
        tiny(input_ids=ids, use_cache=False)
    handle.remove()
    with torch.no_grad():
        handle = plain.module(SITE).register_forward_hook(lambda _m, _a, out: outputs.append(out))
        plain(input_ids=ids, use_cache=False)
    handle.remove()
    last = len(rows[0]) - 1
    assert torch.equal(outputs[0][0, last], book.values[0])
    others = [place for place in range(ids.shape[1]) if place != last]
    assert torch.equal(outputs[0][0, others], outputs[1][0, others])


def test_an_answer_is_written_from_the_prompts_value(tiny):
    """Step by step with a cache, the answer is that of the text with the value at the prompt's end."""
    with_book(tiny, TEXTS[:1], 1e-6)
    (ids,) = encode_texts(tiny.tokenizer, TEXTS[:1])
    written = list(ids)
    for _ in range(5):
        with torch.no_grad(), prompt_lengths(tiny.model, torch.tensor([len(ids)])):
            written.append(int(tiny(input_ids=torch.tensor([written]), use_cache=False).logits[0, -1].argmax()))
    text = tiny.tokenizer.decode(written[len(ids) :], skip_special_tokens=True)
    assert continuations(tiny, TEXTS[:1], 5) == [text]
    assert continuations(tiny, TEXTS, 5)[0] == text


@pytest.mark.parametrize("eps", [1e-6, 100.0])
def test_an_empty_codebook_changes_no_bit(tiny, eps):
    ids = pad(encode_texts(tiny.tokenizer, TEXTS))
    with torch.no_grad():
        before = tiny(input_ids=ids, use_cache=False).logits
        tiny.put(tiny.architecture.path(SITE), Codebook.around(tiny.module(SITE), CodebookSettings(eps)))
        assert torch.equal(tiny(input_ids=ids, use_cache=False).logits, before)
    assert tiny.module(SITE).measured().distance.tolist() == [float("inf")] * len(TEXTS)


def test_the_nearest_key_of_a_ball_answers(lm):
    width = lm.key_width(SITE)
    result = torch.zeros(2, width, dtype=torch.float64)
    result[1, 0] = 2.0
    values = torch.zeros(2, lm.width, dtype=torch.float64)
    book = Codebook(lm.module(SITE), CodebookSettings(1.0), result, values, [(7,), (7,)])
    queries = torch.zeros(4, width, dtype=torch.float64)
    queries[:, 0] = torch.tensor([0.4, 1.6, 2.0, 2.1])
    assert book.decide(queries).tolist() == [1, 2, 2, 0]
    assert book.measured().threshold.tolist() == pytest.approx([2.0 * REACH] * 4)
    assert book.own(1) == 2


def test_a_memory_of_another_model_is_refused(lm):
    book, width = Codebook.around(lm.module(SITE), CodebookSettings()), lm.key_width(SITE)
    with pytest.raises(ShapeError, match="belongs to the model that it was made for"):
        book.grown(torch.zeros(1, width + 1), torch.zeros(1, lm.width), [(1,)])
    with pytest.raises(ShapeError, match=rf"keys \(2, {width}\) and values \(1, {lm.width}\)"):
        Codebook(book.base, CodebookSettings(), torch.zeros(2, width), torch.zeros(1, lm.width), [(1,)])
    with pytest.raises(ConfigError, match=r"settings CodebookSettings\(eps=1.0\), not CodebookSettings\(eps=2.0\)"):
        Codebook.around(book, CodebookSettings(2.0))
    with pytest.raises(ConfigError, match=r"CodebookSettings.eps must be above 0, got 0"):
        CodebookSettings(0)
    with pytest.raises(ConfigError, match="not asked anything yet"):
        book.measured()
    assert isinstance(fold(torch.zeros(0, 2), [], 1.0), Balls)
