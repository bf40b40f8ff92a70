"""Tokens: the subject's last token and the first target token, checked by counting bytes instead of offsets."""

import copy
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cakeflow import Contexts, EditRequest, RequestError
from cakeflow.data.text import join
from cakeflow.forward.tokens import TextBatch, encode, encode_batch, encode_prompts, encode_texts

TEMPLATES = Contexts((("{}",), ("The sky is blue. {}", "Élan 日本 🙂. {}")))

CASES = {
    "middle": EditRequest("The capital city of {} is", "Australia", "Lisbon"),
    "start": EditRequest("{} was written by", "Hamlet", "Charles Dickens"),
    "end": EditRequest("Who wrote the book {}", "Hamlet", "Charles Dickens"),
    "subject-alone": EditRequest("{}", "Hamlet", "a play"),
    "long-target": EditRequest("{} is", "Rome", "a very large city in the middle of Italy, on a river"),
    "one-letter": EditRequest("{} is", "I", "x"),
    "accents": EditRequest("La ville de {} se trouve en", "Saint-Étienne", "Norvège"),
    "emoji": EditRequest("The sign {} means", "🙂👩‍👧", "🚀 to the moon"),
    "emoji-end": EditRequest("The sign of joy is {}", "🙂", "🙃"),
    "cjk": EditRequest("{}の首都は", "日本国", "大阪"),
    "combining": EditRequest("{} is spelled with", "Cafe\u0301 A\u030a", "e\u0301"),
    "combining-after": EditRequest("{}\u0301 is", "e", "an accent"),
    "punctuation": EditRequest("({}), it is said, is", "St. John's", "'good'"),
    "possessive": EditRequest("{}'s mother tongue is", "Marcel Proust", "Spanish"),
    "glued": EditRequest("The {}s live in", "Roman", "Greece"),
    "glued-before": EditRequest("Un{} is", "happy", "sad"),
    "trailing-space": EditRequest("The capital of {} is ", "Peru", "Rome"),
    "trailing-newline": EditRequest("{}\n", "Peru", "Rome"),
    "trailing-apostrophe": EditRequest("{} is called '", "Peru", "the land'"),
    "leading-space": EditRequest("The capital of {} is", "Peru", " Rome"),
    "both-spaces": EditRequest("The capital of {} is ", "Peru", " Rome"),
    "double-space": EditRequest("The  capital  of {}  is", "New  York", "Rome"),
    "braces-in-subject": EditRequest("In Python {} is", "a{}b", "a set"),
    "repeated-before": EditRequest("Paris, Texas, is not Paris; {} is in", "Paris", "Spain"),
    "repeated-after": EditRequest("{} is Paris and Paris is in", "Paris", "Spain"),
    "in-context": EditRequest("The {} is", "sky", "green"),
    "subject-in-target": EditRequest("{} is", "Rome", "Rome in Italy"),
    "hebrew": EditRequest("{} היא בירת", "ירושלים", "צרפת"),
    "hebrew-end": EditRequest("בירת הנורווגים היא {}", "אוסלו", "העיר"),
    "arabic-vowels": EditRequest("عاصمة {} هي", "مِصْر", "القاهرة"),
    "right-to-left-within": EditRequest("The city of {} is in", "حيفا (Haifa)", "نرويج"),
    "direction-marks": EditRequest("The city \u2067{}\u2069 is in", "\u200fمصر\u200e", "\u202bنرويج\u202c"),
    "devanagari": EditRequest("{} की राजधानी", "क्षत्रिय", "दिल्ली"),
    "family": EditRequest("The sign {}👍🏽 stands for", "👩‍👩‍👧‍👦", "👨🏾‍🚀"),
    "flags": EditRequest("{}🇩🇪 play", "🇳🇴🏴󠁧󠁢󠁷󠁬󠁳󠁿", "🏳️‍🌈"),
    "keycap-before": EditRequest("1️⃣{} is", "❤️‍🔥", "❤️"),
    "braces-around": EditRequest('{"{{}}": {"is": [] }} means', "{x}", "{y}"),
    "digits": EditRequest("{} plus 1 is", "12345", "12 346"),
}


def with_parts(tokenizer, front="", back=""):
    """The same tokenizer adding special tokens in front of or behind a text."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>"})
    numbers = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    template = processors.TemplateProcessing(single=f"{front} $A {back}".strip(), special_tokens=numbers)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def padding_on(tokenizer, side):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = tokenizer.truncation_side = side
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


VARIANTS = {
    "left": lambda tokenizer: padding_on(tokenizer, "left"),
    "right": lambda tokenizer: padding_on(tokenizer, "right"),
    "bos": lambda tokenizer: with_parts(tokenizer, "<bos>"),
    "two-bos": lambda tokenizer: with_parts(tokenizer, "<bos> <bos>"),
    "eos": lambda tokenizer: with_parts(tokenizer, "", "<eos>"),
    "both": lambda tokenizer: with_parts(padding_on(tokenizer, "left"), "<bos>", "<eos>"),
}


@pytest.fixture(params=VARIANTS)
def variant(request, lm):
    tokenizer = VARIANTS[request.param](lm.tokenizer)
    lm.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return replace(lm, tokenizer=tokenizer)


def ends(tokenizer, ids):
    """Index of the byte after each token; byte-level tokens are written with one character per byte."""
    total, result = 0, []
    for token in tokenizer.convert_ids_to_tokens(ids):
        total += 0 if token in ("<bos>", "<eos>") else len(token)
        result.append(total)
    return result


def check(tokenizer, row, text, subject_end, target_start):
    """The row spells the text; its marks are the tokens with the subject's last and the target's first byte."""
    after = ends(tokenizer, row.ids)
    size = len(text.encode())
    assert after[-1] == size
    assert tokenizer.decode(row.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
    if subject_end:
        last = len(text[:subject_end].encode())
        assert row.subject == next(i for i, end in enumerate(after) if end >= last)
    first = len(text[:target_start].encode())
    assert row.target == next(i for i, end in enumerate(after) if end > first)


@pytest.mark.parametrize("name", CASES)
def test_subject_and_target_are_found(name, variant):
    request = CASES[name]
    batch = encode_batch(variant, [request], TEMPLATES)
    assert (len(batch), batch.weights) == (1, ((0.5, 0.25, 0.25),))
    for template, row in zip(TEMPLATES.templates, batch.rows[0], strict=True):
        start = template.index("{}")
        prompt = template[:start] + request.text + template[start + 2 :]
        text = join(prompt, request.target_new)
        assert prompt[start + request.subject_end - len(request.subject) :].startswith(request.subject)
        check(variant.tokenizer, row, text, start + request.subject_end, len(prompt))
        assert row.subject < row.target < len(row.ids)


@pytest.mark.real
@pytest.mark.parametrize("name", CASES)
def test_subject_and_target_are_found_by_the_real_tokenizer(name, smollm2):
    test_subject_and_target_are_found(name, smollm2)


@pytest.mark.parametrize("name", CASES)
def test_essence_ends_where_the_prompt_ends(name, variant):
    (row,) = encode_batch(variant, [CASES[name]], TEMPLATES).essence
    subject = CASES[name].subject
    after = ends(variant.tokenizer, row.ids)
    assert variant.tokenizer.decode(row.ids, skip_special_tokens=True) == f"{subject} is a"
    assert row.subject == next(i for i, end in enumerate(after) if end >= len(subject.encode()))


def test_target_tokens_decode_to_the_target(lm):
    for request in CASES.values():
        (row,) = encode_prompts(lm.tokenizer, [request.text], [request.target_new])
        assert lm.tokenizer.decode(row.ids[row.target :]).strip() == request.target_new.strip()
        assert row.subject == -1


def test_special_tokens_stay_in_front_only(lm):
    plain, decorated = lm.tokenizer, VARIANTS["both"](lm.tokenizer)
    (row,), (bare,) = (encode_prompts(tokenizer, ["A prompt"], ["here"]) for tokenizer in (decorated, plain))
    assert row.ids == (decorated.bos_token_id, *bare.ids)
    assert row.target == bare.target + 1


def test_many_requests_in_one_call_equal_one_by_one(lm):
    together = encode_batch(lm, list(CASES.values()), TEMPLATES)
    for index, request in enumerate(CASES.values()):
        alone = encode_batch(lm, [request], TEMPLATES)
        assert together.rows[index] == alone.rows[0]
        assert together.essence[index] == alone.essence[0]
    assert together.requests == tuple(CASES.values())


WORDS = st.text(min_size=1, max_size=10).filter(lambda text: text.strip() and "{" not in text and "}" not in text)


@pytest.fixture(scope="module")
def gpt2(_models):
    return _models["gpt2"]


@given(before=WORDS | st.just(""), subject=WORDS, after=WORDS | st.just(""), target=WORDS)
@example(before="", subject="0 ", after="", target="l")  # the token " l" is of both
def test_any_text(gpt2, before, subject, after, target):
    """Both marks are right; where one token holds the subject's end and the target's beginning, a batch refuses it."""
    prompt = before + subject + after
    text, subject_end = join(prompt, target), len(before) + len(subject)
    (row,) = encode(gpt2.tokenizer, [text], [subject_end], [len(prompt)])
    check(gpt2.tokenizer, row, text, subject_end, len(prompt))
    request = EditRequest(before + "{}" + after, subject, target)
    if row.subject < row.target:
        batch = encode_batch(gpt2, [request], Contexts())
        assert replace(batch.rows[0][0], start=-1) == row
    else:
        assert row.subject == row.target
        with pytest.raises(RequestError, match="no token of its own") as caught:
            encode_batch(gpt2, [request], Contexts())
        assert [(fault.index, fault.field) for fault in caught.value.faults] == [(0, "target_new")]


@pytest.fixture
def wordy(lm):
    """A tokenizer of another family: words with a marker for the space before, a BOS, and a character it drops."""
    words = ["▁The", "▁capital", "▁of", "▁Peru", "▁is", "▁Lima", "▁big", "<unk>", "<s>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Replace("☃", ""), normalizers.Strip()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 8)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")
    return replace(lm, tokenizer=tokenizer)


def test_tokenizer_with_word_markers(wordy):
    batch = encode_batch(wordy, [EditRequest("The capital of {} is", "Peru", "big Lima")], Contexts())
    row = batch.rows[0][0]
    tokens = wordy.tokenizer.convert_ids_to_tokens(row.ids)
    assert tokens == ["<s>", "▁The", "▁capital", "▁of", "▁Peru", "▁is", "▁big", "▁Lima"]
    assert (tokens[row.subject], tokens[row.target]) == ("▁Peru", "▁big")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (EditRequest("The capital of {} is", "Peru", "☃"), "target_new"),
        (EditRequest("{} is the capital of", "☃", "Peru"), "subject"),
    ],
)
def test_text_without_a_token_is_refused(wordy, request_, field):
    good = EditRequest("The capital of {} is", "Peru", "big")
    with pytest.raises(RequestError) as caught:
        encode_batch(wordy, [good, request_], Contexts())
    assert [(problem.index, problem.field) for problem in caught.value.faults] == [(1, field)]


def test_texts_that_are_too_long_are_refused_all_at_once(lm):
    limit = lm.model.config.max_position_embeddings
    long = "word " * limit
    fits = EditRequest("{} is", "Peru", "big")
    requests = [fits, EditRequest(long + "{} is", "Peru", "big"), fits, EditRequest("{} is", "Peru", long)]
    with pytest.raises(RequestError, match=f"longer than the model's {limit} positions") as caught:
        encode_batch(lm, requests, Contexts())
    assert [problem.index for problem in caught.value.faults] == [1, 3]


def test_a_text_that_is_just_short_enough_is_taken(lm):
    limit = lm.model.config.max_position_embeddings
    size = len(encode_batch(lm, [EditRequest("{} is", "Peru", "a")], Contexts()).rows[0][0].ids)
    request = EditRequest("{} is", "Peru", "a" + " a" * (limit - size))
    (row,) = encode_batch(lm, [request], Contexts()).rows[0]
    assert len(row.ids) == limit
    with pytest.raises(RequestError):
        encode_batch(lm, [replace(request, target_new=request.target_new + " a")], Contexts())


def test_a_text_to_go_on_from_ends_with_its_own_token(lm):
    plain, decorated = lm.tokenizer, VARIANTS["both"](lm.tokenizer)
    bos = decorated.bos_token_id
    rows = encode_texts(decorated, ["A prompt", ""])
    assert rows == [(bos, *plain("A prompt")["input_ids"]), (bos,)]
    assert encode_texts(decorated, []) == []


def test_a_request_says_whether_a_space_stands_before_its_target(lm):
    spaces = {None: "在", True: " 在", False: "在"}
    for space, target in spaces.items():
        batch = encode_batch(lm, [EditRequest("{}的首都", "中国", "在", space=space)], TEMPLATES)
        for row in batch.rows[0]:  # behind English contexts as well
            assert lm.tokenizer.decode(row.ids[row.target :]) == target
    (row,) = encode_prompts(lm.tokenizer, ["Ann"], ["Bob"], [False])
    assert lm.tokenizer.decode(row.ids) == "AnnBob"


CHINESE = ["我们学习历史在北京。", "首都是北京。", "他们住在上海。"] * 20


def trained(kind):
    """A tokenizer that merges characters across words: byte-level, or with word markers that it adds in front."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    marked = kind == "markers"
    level, metaspace = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Metaspace(prepend_scheme="first"),
    )
    backend.pre_tokenizer = metaspace if marked else level
    backend.decoder = decoders.Metaspace() if marked else decoders.ByteLevel()
    alphabet = ["\n"] if marked else pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<bos>"]
    backend.train_from_iterator(
        CHINESE, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<bos>")


@pytest.mark.parametrize(("kind", "text"), [("byte-level", "首都是北京"), ("markers", "首都是北京。")])
def test_a_prompt_keeps_its_own_tokens_where_the_target_would_join_them(kind, text):
    """A model meets the prompt alone, so the target must follow the tokens that the prompt has then."""
    tokenizer, prompt = trained(kind), text[:3]
    (whole,) = encode(tokenizer, [text], [0], [len(text)])
    assert len(whole.ids) == 2  # the tokenizer's own way: one token for all of it
    (row,) = encode(tokenizer, [text], [2], [3], [0])
    assert list(row.ids[: row.target]) == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(row.ids, skip_special_tokens=True) == text
    assert tokenizer.decode(row.ids[row.target :]) == text[3:]
    assert 1 == row.start <= row.subject < row.target


@pytest.mark.parametrize(
    ("request_", "field", "piece"),
    [
        (EditRequest("The capital of {} is", "Peru", "big 北京 Lima"), "target_new", "北京"),
        (EditRequest("The capital of {} is", "Chile", "Lima"), "subject", "Chile"),
    ],
)
def test_a_token_that_stands_for_the_unknown_is_refused(wordy, request_, field, piece):
    good = EditRequest("Near {} is", "Peru", "big")  # elsewhere in a prompt it says little
    wordy.tokenizer.pad_token = wordy.tokenizer.unk_token  # as many do
    with pytest.raises(RequestError, match=f"does not know '{piece}', which becomes <unk>") as caught:
        encode_batch(wordy, [good, request_], Contexts())
    assert [(fault.index, fault.field) for fault in caught.value.faults] == [(1, field)]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (EditRequest("{} is in <ent>", "Peru", "Lima"), "prompt"),
        (EditRequest("{} is in", "<ent>", "Lima"), "subject"),
        (EditRequest("{} is in", "Peru", "<ent>"), "target_new"),
    ],
)
def test_a_token_beyond_the_embedding_is_refused(lm, request_, field):
    size = len(lm.embedding)
    lm.tokenizer.add_tokens(["<ent>"])
    with pytest.raises(RequestError, match=f"has the token '<ent>', number {size}, .* ends with {size - 1}") as caught:
        encode_batch(lm, [EditRequest("{} is", "Peru", "big"), request_], TEMPLATES)
    assert [(fault.index, fault.field) for fault in caught.value.faults] == [(1, field)]
    contexts = Contexts.of(["{}", "An <ent>. {}"])
    with pytest.raises(RequestError, match="'<ent>'"):
        encode_batch(lm, [EditRequest("{} is", "Peru", "big")], contexts)
    lm.model.resize_token_embeddings(len(lm.tokenizer), mean_resizing=False)
    assert encode_batch(lm, [request_], contexts).rows


def test_a_prompt_that_repeats_the_special_tokens_at_its_front_is_refused(variant):
    request = EditRequest("<bos>{} is in", "Peru", "Lima")
    if variant.front:
        with pytest.raises(RequestError, match="begins with '<bos>', which the tokenizer puts in front by itself"):
            encode_batch(variant, [request], TEMPLATES)
    elif "<bos>" in variant.tokenizer.get_vocab():
        (row,) = encode_batch(variant, [request], Contexts()).rows[0]
        assert row.ids.count(variant.tokenizer.bos_token_id) == 1


def test_what_stands_before_an_answer_in_a_chat_decides_about_its_space(lm):
    contexts = Contexts(chats=("ask: {}\n", "ask: {} [end]"))
    asked = EditRequest("{} is", "Rome", "old", space=False)
    bare, line, mark = encode_batch(lm, [asked], contexts).rows[0]
    texts = [lm.tokenizer.decode(row.ids) for row in (bare, line, mark)]
    assert texts == ["Rome isold", "ask: Rome is\nold", "ask: Rome is [end] old"]


def test_entries_of_a_fact_share_a_value_at_the_same_token_and_bring_all_of_their_keys_together(lm):
    one, two, three = (
        EditRequest("{} is", "Rome", "x"),
        EditRequest("{} has", "Rome", "y"),
        EditRequest("{} is", "Oslo", "x"),
    )
    plain, chat = (encode_batch(lm, [one, two, three], Contexts(((template,),))) for template in ("{}",) * 2)
    moved = [tuple(replace(row, ids=(5, *row.ids), subject=row.subject + 1) for row in rows) for rows in chat.rows]
    chat = TextBatch(chat.requests, moved, chat.essence, chat.weights, chat.numbers)
    both = TextBatch.join([plain.part([0]), chat.part([0]), plain.part([2]), chat.part([1]), plain.part([1])])
    assert both.key_groups() == [0, 1, 2, 1, 0]
    assert both.value_groups() == [0, 0, 2, 0, 0]
    assert both.part([0, 2, 3]).value_groups() == [0, 1, 2]
