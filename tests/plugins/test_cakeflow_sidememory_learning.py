"""One edit of a side memory, against plain gradient descent on the weight of a whole model."""

from dataclasses import replace

import pytest
import torch
from cakeflow_sidememory import LearningProblem, LearningRule, Margin, SideMemory, learn, original_weight
from cakeflow_sidememory.distance import activation_name, activation_of
from cakeflow_sidememory.rows import edit_rows
from torch.func import functional_call

from cakeflow.errors import ConfigError, NumericalError
from cakeflow.forward import encode_texts
from cakeflow.forward.tokens import Row
from cakeflow.models import Site

SITE = Site(3, "mlp_out")
RULE = LearningRule(lr=0.5, steps=4, margin=None, decay=0.0, clamp=None)


def rows_of(lm, padding="right"):
    ids = encode_texts(
        lm.tokenizer, ["The capital city of Australia is Lisbon", "I say The capital city of Australia is Lisbon"]
    )
    starts = [len(each) - 2 for each in ids]
    variants = [Row(each, 0, start) for each, start in zip(ids, starts, strict=True)]
    (other,) = encode_texts(lm.tokenizer, ["She walked along the river"])
    return edit_rows(variants, other, padding, 0)


def problem_of(lm, padding="right"):
    return LearningProblem(lm, SITE, rows_of(lm, padding), activation_of(activation_name(lm)))


def everything(lm):
    return torch.ones_like(original_weight(lm, SITE)).bool()


def whole_loss(lm, rows, weight):
    """Mean over the rows of the mean negative log-likelihood of their labels, by the whole model."""
    name = lm.weight_name(SITE)
    changed = {name: lm.oriented(SITE, weight) if weight.shape != lm.weight(SITE).shape else weight}
    inputs = {"input_ids": rows.ids, "attention_mask": rows.mask.long(), "use_cache": False}
    logits = functional_call(lm.model, changed, (), inputs, tie_weights=False).logits
    losses = []
    for row in range(rows.edited):
        places = (rows.labels[row] != -100).nonzero().flatten()
        logprobs = logits[row, places - 1].log_softmax(-1)
        losses.append(-logprobs[torch.arange(len(places)), rows.ids[row, places]].mean())
    return torch.stack(losses).mean()


def test_without_margin_mask_and_decay_it_is_plain_descent(tiny):
    problem, weight = problem_of(tiny), original_weight(tiny, SITE).clone()
    learned = learn(problem, weight, everything(tiny), RULE)
    expected, losses = weight, []
    for _ in range(RULE.steps):
        leaf = expected.clone().requires_grad_()
        loss = whole_loss(tiny, problem.rows, leaf)
        (gradient,) = torch.autograd.grad(loss, leaf)
        losses.append(float(loss.detach()))
        expected = expected - RULE.lr * gradient
    bar = 1e-12 if tiny.model.config.model_type == "gpt2" else 1e-6  # the library's norms of llama are float32
    assert learned.losses == pytest.approx(losses, rel=bar)
    change = learned.weight - weight
    assert (change - (expected - weight)).norm() <= bar * change.norm()
    assert learned.losses[-1] < learned.losses[0]


def test_the_model_stays_as_it_is(lm):
    before = lm.fingerprint()
    learn(problem_of(lm), original_weight(lm, SITE).clone(), everything(lm), RULE)
    assert lm.fingerprint() == before
    assert all(parameter.requires_grad for parameter in lm.model.parameters())


def test_decay_stays_within_the_mask_unless_it_is_everywhere(lm):
    weight, mask = original_weight(lm, SITE).clone(), everything(lm)
    mask[:, ::2] = False
    rule = replace(RULE, decay=1e-2)
    clean = learn(problem_of(lm), weight, mask, rule).weight
    assert torch.equal(clean[~mask], weight[~mask])
    official = learn(problem_of(lm), weight, mask, replace(rule, decay_everywhere=True)).weight
    torch.testing.assert_close(official[~mask], weight[~mask] * (1 - rule.lr * 1e-2) ** rule.steps)


def test_a_clamp_bounds_every_entry(lm):
    weight = original_weight(lm, SITE).clone()
    learned = learn(problem_of(lm), weight, everything(lm), replace(RULE, lr=50.0, clamp=0.05))
    assert (learned.weight - weight).abs().max() == pytest.approx(0.05)


def test_a_margin_moves_distances_apart(tiny):
    rule = LearningRule(lr=4.0, steps=25, margin=Margin(0.5, 4.0, 2.0), clamp=None)
    learned = learn(problem_of(tiny), original_weight(tiny, SITE).clone(), everything(tiny), rule)
    assert learned.distances[0] == [0, 0]
    assert min(learned.distances[-1]) > max(learned.irrelevant[-1]) + 2 - 1e-6
    assert learned.activation == pytest.approx(sum(learned.distances[-1]) / 2)


def test_it_stops_where_the_loss_is_small_and_still(lm):
    """At most 0.02, and changed by at most 1e-4 in the last step (WISE's code)."""
    with torch.no_grad():  # else no loss of the tiny model is small
        lm.module(lm.architecture.final_norm).weight.mul_(20)
    rule, (ids,) = replace(RULE, lr=0.5, steps=2000), encode_texts(lm.tokenizer, ["The capital city of Australia is a"])
    rows = edit_rows([Row(ids, 0, len(ids) - 1)], ids[:3], "right", 0)
    problem = LearningProblem(lm, SITE, rows, activation_of(activation_name(lm)))
    learned = learn(problem, original_weight(lm, SITE).clone(), everything(lm), rule)
    assert len(learned.losses) < 2000
    assert learned.losses[-1] <= 0.02
    assert abs(learned.losses[-1] - learned.losses[-2]) <= 1e-4
    assert all(abs(a - b) > 1e-4 or b > 0.02 for a, b in zip(learned.losses[:-2], learned.losses[1:-1], strict=True))


def test_a_loss_that_is_not_finite_is_an_error(lm):
    weight = torch.full_like(original_weight(lm, SITE), torch.nan)
    with pytest.raises(NumericalError, match="the loss of the side memory is nan at step 0; set lr lower"):
        learn(problem_of(lm), weight, everything(lm), RULE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearningRule(lr=float("nan")), "lr=nan"),
        (lambda: LearningRule(decay=float("nan")), "decay=nan"),
        (lambda: LearningRule(clamp=float("nan")), "clamp=nan"),
        (lambda: LearningRule(steps=2.5), "steps must be a whole number"),
        (lambda: LearningRule(extra=-1), "extra must be a whole number"),
        (lambda: Margin(beta=float("nan")), "beta=nan"),
        (lambda: Margin(gamma=float("inf")), "gamma=inf"),
        (lambda: SideMemory("model", irrelevant=["a", " "]), "irrelevant has no text, or one that is blank"),
        (lambda: SideMemory("model", irrelevant="a text"), "irrelevant has no text"),
        (lambda: SideMemory("model", irrelevant=[]), "irrelevant has no text"),
        (lambda: SideMemory("model", padding="middle"), "padding must be one of right, left"),
        (lambda: SideMemory("model", seed=-1), "seed must be a whole number"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
