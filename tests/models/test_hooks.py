"""capture, inject, resume and narrow: they see the true numbers and leave the model as they found it."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import cakeflow
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture, inject, logits_at, start_at

BOUNDARIES = ["success", "exception", "interrupt"]


def traces(lm):
    """Everything a hook or a bypass would leave behind."""
    hooks = [m for m in lm.model.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    return hooks + [m for m in lm.model.modules() if "forward" in m.__dict__]


@pytest.fixture
def ids():
    return torch.randint(1, 600, (3, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def forward(lm, ids):
    return lm.model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def states(lm, ids):
    """Hidden states by the library's own means (on a copy: it leaves hooks); entry l is what enters block l."""
    return copy.deepcopy(lm.model)(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states


def test_capture_sees_what_the_library_reports(tiny, ids):
    sites = [Site(layer) for layer in range(tiny.depth - 1)]
    with capture(tiny, sites) as seen:
        forward(tiny, ids)
    for site, expected in zip(sites, states(tiny, ids)[1:], strict=False):
        assert torch.equal(seen[site], expected)


def test_capture_in_and_out_of_a_projection_fit_together(tiny, ids):
    site = Site(2, "mlp_out")
    with capture(tiny, [site], side="in") as before, capture(tiny, [site]) as after:
        forward(tiny, ids)
    bias = tiny.module(site).bias
    expected = before[site] @ tiny.oriented(Site(2, "mlp_out")).T + (0 if bias is None else bias.detach())
    torch.testing.assert_close(after[site], expected, rtol=0, atol=1e-12)


class Doubler(nn.Module):
    """Stands for blocks of library versions that return a tuple, or a tensor."""

    def __init__(self, block, as_tuple):
        super().__init__()
        self.block, self.as_tuple = block, as_tuple

    def forward(self, *args, **kwargs):
        value = self.block(*args, **kwargs)
        value = value[0] if isinstance(value, tuple) else value
        return (value, "extra") if self.as_tuple else value


@pytest.mark.parametrize("as_tuple", [False, True])
def test_tuple_and_tensor_outputs(lm, ids, as_tuple):
    block, at = Doubler(lm.module(Site(3)), as_tuple), torch.tensor([2, 2, 2])
    delta = torch.ones(3, 48, dtype=torch.float64)
    lm.model.transformer.h[3] = block
    expected = states(lm, ids)[4] if not as_tuple else None
    results = []
    handle = block.register_forward_hook(lambda _m, _a, out: results.append(out))
    lm.model.transformer.h[4].forward = lambda hidden, *_a, **_k: hidden[0] if isinstance(hidden, tuple) else hidden
    with capture(lm, [Site(3)]) as seen:
        forward(lm, ids)
    with inject(lm, Site(3), delta, at), capture(lm, [Site(3)]) as changed:
        forward(lm, ids)
    handle.remove()
    assert isinstance(results[-1], tuple) is as_tuple
    assert expected is None or torch.equal(seen[Site(3)], expected)
    difference = changed[Site(3)] - seen[Site(3)]
    assert torch.allclose(difference[:, 2], delta)
    assert difference.abs().sum() == pytest.approx(delta.sum().item())


def test_stop_ends_the_pass_and_the_body_after_the_last_site(tiny, ids):
    ran = []
    handles = [tiny.module(Site(i)).register_forward_hook(lambda *_a, i=i: ran.append(i)) for i in range(tiny.depth)]
    with capture(tiny, [Site(1), Site(3)], stop=True) as seen:
        forward(tiny, ids)
        ran.append("body went on")
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 2, 3]
    assert set(seen) == {Site(1), Site(3)}


def test_capture_of_nothing_does_nothing(lm, ids):
    with capture(lm, [], stop=True) as seen:
        logits = forward(lm, ids)
    assert seen == {}
    assert torch.equal(logits, forward(lm, ids))


@pytest.mark.parametrize("role", ["block", "mlp_out", "attn_out"])
def test_inject_changes_nothing_before_its_position(tiny, ids, role):
    plain, at = forward(tiny, ids), torch.tensor([1, 4, 8])
    delta = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))  # a constant would vanish in LayerNorm
    with inject(tiny, Site(2, role), delta, at):
        changed = forward(tiny, ids)
    for row, position in enumerate(at.tolist()):
        assert torch.equal(changed[row, :position], plain[row, :position])
        assert (changed[row, position:] - plain[row, position:]).abs().amax(-1).min() > 1e-6


def test_inject_at_several_positions_of_a_row(tiny, ids):
    plain, delta = forward(tiny, ids), torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    with inject(tiny, Site(2, "mlp_out"), delta, torch.tensor([1, 4, 8]), rows=torch.tensor([0, 0, 2])):
        changed = forward(tiny, ids)
    with inject(tiny, Site(2, "mlp_out"), delta[1:2], torch.tensor([4]), rows=torch.tensor([0])):
        one = forward(tiny, ids)
    assert torch.equal(changed[1], plain[1])
    assert torch.equal(changed[2, :8], plain[2, :8])
    assert torch.equal(one[0, :4], plain[0, :4])
    assert (changed[0, 1:4] - plain[0, 1:4]).abs().amax(-1).min() > 1e-6
    assert (changed[0, 4:] - one[0, 4:]).abs().amax(-1).min() > 1e-6


def test_inject_is_out_of_place_and_passes_gradients(tiny, ids):
    delta = torch.zeros(3, 48, dtype=torch.float64, requires_grad=True)
    originals = []
    handle = tiny.module(Site(2, "mlp_out")).register_forward_hook(lambda _m, _a, out: originals.append(out))
    plain = states(tiny, ids)
    before = [value.clone() for value in plain]
    with inject(tiny, Site(2, "mlp_out"), delta + 1, torch.tensor([3, 3, 3])):
        tiny.model(input_ids=ids, use_cache=False).logits.square().sum().backward()
    handle.remove()
    assert torch.equal(originals[0], originals[1].detach())  # the module's own output was not written to
    assert all(torch.equal(a, b) for a, b in zip(plain, before, strict=True))
    assert delta.grad.abs().sum() > 0


def test_narrow_equals_full_logits(tiny, ids):
    rows, columns = torch.tensor([2, 0, 0, 1]), torch.tensor([8, 0, 5, 3])
    full = forward(tiny, ids)
    with logits_at(tiny, rows, columns):
        narrowed = forward(tiny, ids)
    assert narrowed.shape == (1, 4, 600)
    torch.testing.assert_close(narrowed[0], full[rows, columns], rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [0, 1, 4, 6])
def test_resume_equals_the_full_pass(tiny, ids, layer):
    entering = states(tiny, ids)[layer] if layer < 6 else None
    if entering is None:
        with capture(tiny, [Site(5)]) as seen:
            forward(tiny, ids)
        entering = seen[Site(5)]
    with start_at(tiny, layer, entering):
        logits = forward(tiny, ids)
    torch.testing.assert_close(logits, forward(tiny, ids), rtol=0, atol=1e-12)


def test_resume_skips_the_blocks_below(tiny, ids):
    entering = states(tiny, ids)[3]
    with torch.no_grad():
        for layer in range(3):
            tiny.weight(Site(layer, "mlp_out")).fill_(float("nan"))
    with start_at(tiny, 3, entering):
        assert torch.isfinite(forward(tiny, ids)).all()
    assert not torch.isfinite(forward(tiny, ids)).any()


def test_resume_puts_back_a_forward_that_was_there(lm, ids):
    block = lm.module(Site(0))
    mine = block.forward
    block.forward = mine
    with start_at(lm, 2, states(lm, ids)[2]):
        assert block.forward is not mine
    assert block.__dict__["forward"] is mine


@pytest.mark.parametrize("ending", BOUNDARIES)
@pytest.mark.parametrize("tool", ["capture", "inject", "start_at", "logits_at"])
def test_nothing_is_left_behind(tiny, ids, tool, ending):
    one = torch.tensor([0])
    contexts = {
        "capture": lambda: capture(tiny, [Site(1), Site(2, "mlp_out"), Site(4)], side="in", stop=ending == "success"),
        "inject": lambda: inject(tiny, Site(2), torch.ones(1, 48), one),
        "start_at": lambda: start_at(tiny, 3, states(tiny, ids)[3]),
        "logits_at": lambda: logits_at(tiny, one, one),
    }
    plain = forward(tiny, ids)
    error = {"exception": RuntimeError, "interrupt": KeyboardInterrupt}.get(ending)

    def use():
        with contexts[tool]():
            assert traces(tiny)
            if error is not None:
                raise error
            forward(tiny, ids[:1])

    if error is None:
        use()
    else:
        with pytest.raises(error):
            use()
    assert not traces(tiny)
    assert torch.equal(forward(tiny, ids), plain)


def test_nothing_is_left_behind_when_the_pass_itself_fails(tiny, ids):
    with (
        pytest.raises((IndexError, RuntimeError)),
        capture(tiny, [Site(1)]),
        start_at(tiny, 2, states(tiny, ids)[2]),
        inject(tiny, Site(3), torch.ones(1, 48), torch.tensor([99])),
        logits_at(tiny, torch.tensor([0]), torch.tensor([0])),
    ):
        forward(tiny, ids)
    assert not traces(tiny)


def test_a_site_that_is_missing_leaves_no_hook_on_the_others(lm):
    with pytest.raises(ValueError, match=r"no module 'transformer\.h\.77'"), capture(lm, [Site(1), Site(77)]):
        pass
    assert not traces(lm)


def test_only_this_file_hooks_modules():
    folder = Path(cakeflow.__file__).parent
    hooking = {p.name for p in folder.rglob("*.py") if "register_forward" in p.read_text(encoding="utf-8")}
    assert hooking <= {"hooks.py", "language.py", "routing.py"}  # language.py: looks once whether blocks return tuples
