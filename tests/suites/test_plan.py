"""Plans: time is proportional to what is counted, memory is the edits' own estimate, and no weight is needed."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cakeflow.errors import ConfigError
from cakeflow.forward.tokens import encode_batch
from cakeflow.suites import arms_of, plan, read_suite
from cakeflow.suites.plan import DECODED, PART, SIDE, rate, shape_of

SPEED = 1e9
METHODS = {"memit_seq": {}, "long": {"method": "memit_seq", "targets": {"steps": 6}}, "retrieval": {}}


def estimates(path):
    return {(each.arm.method, each.arm.size): each for each in plan(arms_of(read_suite(path)), SPEED)}


def test_memory_is_what_the_edit_itself_estimates(write):
    path = write(methods={"memit_seq": {}}, sizes=[4], batch_size=4, metrics=["efficacy"])
    (each,) = estimates(path).values()
    module = each.arm.module()
    module.setup()
    batch = encode_batch(module.lm, each.arm.requests.requests, module.contexts)
    assert each.bytes == module.estimate(batch).peak
    assert each.model == sum(parameter.nbytes for parameter in module.model.parameters())


def test_seconds_are_the_tokens_of_search_keys_and_answers_over_the_rate(write):
    result = estimates(write(methods=METHODS, sizes=[4], metrics=["efficacy"]))
    one, other = result["memit_seq", 4], result["long", 4]
    lm = shape_of(one.arm.suite)
    entries = sum(parameter.numel() for parameter in lm.model.parameters())
    rows = [row for each in encode_batch(lm, one.arm.requests.requests, one.arm.module().contexts).rows for row in each]
    suffix = sum(len(row.ids) - 1 - row.fact for row in rows)
    above = (lm.depth - 1 - 1) / lm.depth  # blocks above layer 1
    shared = (one.seconds - 3 * 3 * above * suffix * entries / (SPEED * PART)) / 2
    per_token = entries / (SPEED * PART)
    keys = 2 * sum(len(row.ids) for row in rows) * per_token
    questions = (
        one.seconds - 3 * 3 * above * suffix * per_token - keys
    ) / 2  # the first arm asks the unedited model too
    assert shared > 0
    assert other.seconds == pytest.approx(3 * 6 * above * suffix * per_token + keys + questions)
    prompts = [len(text.split()) for each in one.arm.requests.requests for text in
               (each.text, *(probe.prompt for probe in each.probes))]  # fmt: skip
    tokens = sum(3 * words + DECODED * 32 for words in prompts) + 4 * 3 * DECODED * 12
    assert questions == pytest.approx(tokens * per_token)


def test_twice_the_rate_is_half_the_time(write):
    arms = arms_of(read_suite(write()))
    slow, fast = plan(arms, SPEED), plan(arms, 2 * SPEED)
    assert [each.seconds for each in slow] == pytest.approx([2 * each.seconds for each in fast])


def test_memory_of_other_methods_is_not_known(write):
    assert math.isnan(estimates(write(methods=METHODS))["retrieval", 4].bytes)


def test_a_shape_takes_the_place_of_a_model_that_is_not_there(write):
    config = {"vocab_size": 300, "n_embd": 32, "n_layer": 3, "n_head": 2}
    shape = {"tokenizer": "toy", "model_type": "gpt2", **config}
    result = estimates(write(model="meta-llama/none", shape=shape, methods={"memit_seq": {}}))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **config))
    assert result["memit_seq", 4].model == sum(each.nbytes for each in model.parameters())
    assert shape_of(result["memit_seq", 4].arm.suite).embedding.device.type == "meta"


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"model_type": "gpt2"}, "'tokenizer'"),
        ({"tokenizer": "toy"}, "'model_type'"),
        ({"tokenizer": "toy", "model_type": "gpt9"}, "gpt9"),
        ({"tokenizer": "nowhere", "model_type": "gpt2"}, "model 'nowhere' is neither"),
        ({}, "model 'meta-llama/none' is neither"),
    ],
)
def test_a_shape_that_no_model_has_is_refused(write, shape, reason):
    suite = read_suite(write(model="meta-llama/none", shape=shape))
    with pytest.raises(ConfigError, match=reason):
        shape_of(suite)


def test_the_rate_is_that_of_products():
    assert 1e7 < rate() < 1e16
    assert SIDE**3 > 1e8
    assert torch.ones(1).device.type == "cpu"
