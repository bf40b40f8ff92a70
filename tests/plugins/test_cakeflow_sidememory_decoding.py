"""Answers as the official driver writes them, with the model as it is."""

from itertools import pairwise

import pytest
import torch
from cakeflow_sidememory.decoding import answer, comma_tokens, less_repeated

from cakeflow.errors import ConfigError
from cakeflow.forward import continuations

IDS = [7, 8, 9]


def test_an_answer_is_greedy_and_its_logits_are_those_of_whole_texts(tiny):
    tokens, logits = answer(tiny, IDS, tokens=5)
    with torch.no_grad():
        for step, row in enumerate(logits):
            text = torch.tensor([[*IDS, *tokens[:step]]])
            torch.testing.assert_close(row, tiny(input_ids=text, use_cache=False).logits[0, -1], rtol=1e-6, atol=1e-6)
            assert tokens[step] == int(row.argmax())


def test_without_commas_it_is_what_continuations_write(tiny):
    text = "The first letter"
    tokens, _ = answer(tiny, tiny.tokenizer(text)["input_ids"], tokens=6)
    assert tiny.tokenizer.decode(tokens, skip_special_tokens=True) == continuations(tiny, [text], 6)[0]


def test_an_answer_ends_with_the_text_and_needs_a_question(lm):
    lm.tokenizer.eos_token = lm.tokenizer.convert_ids_to_tokens(answer(lm, IDS, 1)[0][0])
    assert len(answer(lm, IDS)[0]) == 1
    with pytest.raises(ConfigError, match="the question has no token"):
        answer(lm, [])


def test_behind_a_comma_all_that_was_written_is_less_likely():
    logits = torch.tensor([20.0, -20.0, 3.0, 1.0])
    assert less_repeated(logits, [0, 1], {3}) is logits
    assert less_repeated(logits, [0, 1, 3, 0], {3}).tolist() == pytest.approx([2.0, -2.0, 3.0, 0.1])
    assert logits.tolist() == [20.0, -20.0, 3.0, 1.0]


def test_the_rule_for_commas_changes_an_answer(lm):
    plain, _ = answer(lm, IDS, tokens=12)
    ruled, _ = answer(lm, IDS, tokens=12, commas=plain[:1])
    repeats = [sum(a == b for a, b in pairwise(tokens)) for tokens in (plain, ruled)]
    assert ruled[0] == plain[0]
    assert ruled != plain
    assert repeats[1] <= repeats[0]


def test_comma_tokens_are_commas(lm):
    assert {lm.tokenizer.decode([i]).strip() for i in comma_tokens(lm)} == {","}
