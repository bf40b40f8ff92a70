"""What exports are asked."""

import math

import torch
from tiny_vision import random_vision_model

from cakeflow.export.questions import answers_of, difference, questions
from cakeflow.journal.journal import Journal


def test_answers_are_logits_of_every_token(lm):
    texts = ["Ann plays", "The"]
    answers = answers_of(lm, texts)
    for text, answer in zip(texts, answers, strict=True):
        ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
        assert torch.equal(answer, lm.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
    assert difference(answers, answers) == 0
    assert difference([answers[0] * 2], [answers[0]]) == 1


def test_a_number_that_is_none_is_a_difference():
    one, other = torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0])
    assert math.isnan(difference([other, one], [other, other]))


def test_without_texts_some_words_are_asked(lm):
    assert questions(Journal(lm)) == ["The"]


@torch.no_grad()
def test_a_model_of_images_is_asked_about_noise():
    vm = random_vision_model()
    (answers,) = answers_of(vm, ["image 0123456789ab"])
    assert torch.equal(answers, vm.logits(vm.noise(8)))
