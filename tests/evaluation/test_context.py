"""Facts behind other text: what the model is asked in each context, written out."""

import pytest

from cakeflow import EditRequest
from cakeflow.data.builtin import neutral_text
from cakeflow.data.text import states, until_stop
from cakeflow.errors import ConfigError, RequestError
from cakeflow.evaluation.context import EARLIER, SYSTEM, contexts, states_in_contexts
from cakeflow.forward.generation import continuations

FACTS = [EditRequest("{} plays", "Ann", "golf"), EditRequest("The capital of {} is", "Peru", "Oslo")]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{% endfor %}" + TEMPLATE
)


def first_tokens(lm, text, count):
    return lm.tokenizer.decode(lm.tokenizer(text, add_special_tokens=False)["input_ids"][:count]).strip()


def test_without_a_template_there_are_completions_alone(tiny):
    tiny.tokenizer.chat_template = None
    places = contexts(tiny, lengths=(5, 20))
    before = first_tokens(tiny, neutral_text(), 20)
    assert {name: write("Ann plays") for name, write in places.items()} == {
        "alone": "Ann plays",
        "text_5": f"{first_tokens(tiny, neutral_text(), 5)} Ann plays",
        "text_20": f"{before} Ann plays",
    }


def test_a_chat_has_turns_a_system_prompt_and_other_text_in_the_turn(tiny):
    tiny.tokenizer.chat_template = TEMPLATE
    places = contexts(tiny, (4,), "Some text that goes before.")
    before = first_tokens(tiny, "Some text that goes before.", 4)
    assert {name: write("Ann plays") for name, write in places.items()} == {
        "alone": "Ann plays",
        "text_4": f"{before} Ann plays",
        "chat": "<user>Ann plays<assistant>",
        "chat_4": f"<user>{before} Ann plays<assistant>",
        "turns": f"<user>{EARLIER[0]['content']}<assistant>{EARLIER[1]['content']}<user>Ann plays<assistant>",
        "system": f"<system>{SYSTEM['content']}<user>Ann plays<assistant>",
    }
    tiny.tokenizer.chat_template = NO_SYSTEM
    assert [*contexts(tiny, (4,))] == ["alone", "text_4", "chat", "chat_4", "turns"]


def test_a_fact_counts_where_the_free_answer_states_it(tiny):
    tiny.tokenizer.chat_template = TEMPLATE
    rates = states_in_contexts(tiny, FACTS, (4,))
    assert set(rates) == {"alone", "text_4", "chat", "chat_4", "turns", "system"}
    for name, write in contexts(tiny, (4,)).items():
        chat = name not in ("alone", "text_4")
        (text,) = continuations(tiny, [write("Ann plays")], 24 if chat else 12)
        answer = text if chat else until_stop(text)
        word = answer.split()[0] if answer.split() else "x"
        rate = states_in_contexts(tiny, [EditRequest("{} plays", "Ann", word), FACTS[1]], (4,))[name]
        missed = float(states(answer, "golf"))
        assert rate - rates[name] == pytest.approx((float(states(answer, word)) - missed) / 2)


@pytest.mark.parametrize("lengths", [(0,), (5, 10**6)])
def test_lengths_that_the_text_does_not_have(tiny, lengths):
    with pytest.raises(ConfigError, match="lengths must be from 1 to the"):
        contexts(tiny, lengths)


def test_a_context_that_is_longer_than_the_model(tiny):
    with pytest.raises(RequestError, match="longer than the model"):
        states_in_contexts(tiny, FACTS, (tiny.longest,), neutral_text() * 9)
