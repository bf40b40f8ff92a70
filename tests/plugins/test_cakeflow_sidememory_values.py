"""The value of an entry: what is trained, from where, and that nothing else moves."""

import pytest
import torch
from cakeflow_sidememory import Codebook, CodebookSettings, ValueTraining, learn_entry

from cakeflow.errors import ConfigError, NumericalError
from cakeflow.evaluation import score_targets
from cakeflow.forward import encode_prompts
from cakeflow.models import Site

PROMPT, TARGET = "The first letter of Lund", " of the"
TRAINING = ValueTraining(lr=0.1, steps=3)


def row_of(lm):
    (row,) = encode_prompts(lm.tokenizer, [PROMPT], [TARGET], [False])
    return row


def loss_at(lm, site, row, value):
    """The loss with the value put into the projection's output by hand, in a whole pass."""

    def hook(_module, _args, output):
        output = output.clone()
        output.view(1, len(row.ids), -1)[0, row.target - 1] = value
        return output

    handle = lm.module(site).register_forward_hook(hook)
    logits = lm.model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
    handle.remove()
    labels = torch.tensor(row.ids[row.target :])
    return -logits[row.target - 1 : -1].log_softmax(-1).gather(1, labels[:, None]).mean()


@pytest.mark.parametrize("layer", [0, 2])
def test_it_is_adam_on_the_output_at_one_token(tiny, layer):
    site, row = Site(layer, "mlp_out"), row_of(tiny)
    state = {name: each.clone() for name, each in tiny.model.state_dict().items()}
    entry = learn_entry(tiny, site, row, TRAINING)
    caught = []
    handle = tiny.module(site).register_forward_hook(lambda _m, args, out: caught.append((args[0], out)))
    tiny.model(input_ids=torch.tensor([row.ids]), use_cache=False)
    handle.remove()
    inputs, output = (each.view(len(row.ids), -1)[row.target - 1].detach() for each in caught[0])
    torch.testing.assert_close(entry.key, inputs)
    value = output.clone().requires_grad_()
    adam, losses = torch.optim.Adam([value], lr=0.1), []
    for _ in range(3):
        loss = loss_at(tiny, site, row, value)
        losses.append(loss.item())
        (value.grad,) = torch.autograd.grad(loss, [value])
        adam.step()
    torch.testing.assert_close(entry.value, value.detach())
    assert entry.losses == pytest.approx([*losses, loss_at(tiny, site, row, value).item()])
    assert entry.losses[0] == pytest.approx(-float(score_targets(tiny, [PROMPT], [TARGET[1:]])[0]))
    assert entry.losses[-1] < entry.losses[0]
    assert entry.label == row.ids[row.target :]
    assert all(torch.equal(each, state[name]) for name, each in tiny.model.state_dict().items())
    assert all(each.requires_grad for each in tiny.model.parameters())


def test_it_depends_on_no_codebook_that_is_there(lm):
    site, row = Site(2, "mlp_out"), row_of(lm)
    alone = learn_entry(lm, site, row, TRAINING)
    book = Codebook.around(lm.module(site), CodebookSettings(1e6))
    lm.put(lm.architecture.path(site), book.grown(alone.key[None] + 1, alone.value[None] * 0 + 5, [(1,)]))
    again = learn_entry(lm, site, row, TRAINING)
    assert torch.equal(again.value, alone.value)
    assert torch.equal(again.key, alone.key)
    assert again.losses == alone.losses


def test_it_ends_when_the_loss_is_low_enough(lm):
    losses = learn_entry(lm, Site(2, "mlp_out"), row_of(lm), ValueTraining(lr=0.5, steps=60)).losses
    assert len(losses) == 61
    enough = (losses[5] + losses[4]) / 2
    short = learn_entry(lm, Site(2, "mlp_out"), row_of(lm), ValueTraining(lr=0.5, steps=60, enough=enough)).losses
    first = next(place for place, loss in enumerate(losses) if loss < enough)
    assert short == losses[: first + 1]


def test_bad_training(lm):
    with pytest.raises(ConfigError, match=r"ValueTraining\.steps must be a whole number of at least 1, got 0"):
        ValueTraining(steps=0)
    with pytest.raises(ConfigError, match=r"ValueTraining\.enough must be at least 0, got -1"):
        ValueTraining(enough=-1)
    lm.model.transformer.ln_f.weight.data.mul_(1e308)
    with pytest.raises(NumericalError, match="the loss of a value is nan at step 0; set lr lower"):
        learn_entry(lm, Site(2, "mlp_out"), row_of(lm))
