"""The whole walk through a Lightning Trainer on the tiny models."""

import copy
from dataclasses import replace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from tiny_runs import module_of, name_of

from cakeflow import (
    Contexts,
    EditDataModule,
    Endpoints,
    GradientSearch,
    LeastSquares,
    NullSpace,
    OneHot,
    Scores,
    Sequential,
    Solver,
    Statistics,
    Uniform,
    Weighter,
)
from cakeflow.allocators import Jacobian
from cakeflow.core.callback import EditCallback
from cakeflow.errors import ConfigError, NumericalError
from cakeflow.forward.tokens import encode_batch
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture

LAYERS = [1, 2, 4]
CONTEXTS = Contexts.of(["{}", "I am. {}"])
TARGETS = GradientSearch(steps=4, lr=0.3)


@pytest.fixture(scope="module")
def moments():
    """Second moments with a clear null space, of either width."""
    result = {}
    for width in (192, 112):
        basis = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width))
        vectors = torch.linalg.qr(basis).Q
        values = torch.where(torch.arange(width) < width // 2, 1e-4, 1.0).double()
        result[width] = (vectors * values) @ vectors.T
    return result


@pytest.fixture
def build(moments):
    def make(lm, **changes):
        width = lm.oriented(Site(0, "mlp_out")).shape[1]
        defaults = {
            "layers": LAYERS,
            "contexts": CONTEXTS,
            "targets": TARGETS,
            "moments": dict.fromkeys(range(6), moments[width]),
        }
        return module_of(lm, **{**defaults, **changes})

    return make


def fit(module, requests, quiet, batch_size=6, **trainer):
    trainer = L.Trainer(**{**quiet, **trainer})
    trainer.fit(module, datamodule=EditDataModule(requests, batch_size))
    return trainer


def bits(lm):
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def same(lm, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())


@pytest.mark.parametrize(("batch_size", "steps"), [(12, 1), (5, 3), (4, 3), (1, 12)])
def test_one_step_per_batch(lm, requests, quiet, build, batch_size, steps):
    module = build(lm, layers=[1], targets=replace(TARGETS, steps=2))
    trainer = fit(module, requests, quiet, batch_size)
    assert trainer.global_step == steps
    assert len(module.journal) == steps
    assert [request for step in module.journal for request in step.requests] == requests
    assert len(module.journal.history(name_of(module.lm, 1))) == 12


def test_only_the_edited_projections_change(tiny, requests, quiet, build):
    before = bits(tiny)
    fit(build(tiny), requests, quiet)
    changed = {name for name, tensor in tiny.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {tiny.architecture.path(Site(layer, "mlp_out")) + ".weight" for layer in LAYERS}


def test_the_model_moves_towards_its_targets(tiny, requests, quiet, build):
    """At the anchor, on the bare prompt, the residual that is left is smaller than the one at the start."""
    module = build(tiny, solver=LeastSquares(1e-3), moments=dict.fromkeys(range(6), 1e-6 * torch.eye(keys_width(tiny))))
    prompts = [torch.tensor([tiny.tokenizer(r.text[: r.subject_end])["input_ids"]]) for r in requests]
    before = [at_anchor(tiny, ids) for ids in prompts]
    fit(module, requests, quiet, 12)
    expected = module.journal[0].values[4]
    missing = torch.stack([(expected[i] - at_anchor(tiny, ids)).norm() for i, ids in enumerate(prompts)])
    start = torch.stack([(expected[i] - before[i]).norm() for i in range(12)])
    assert (missing < 0.5 * start).all()


def keys_width(lm):
    return lm.oriented(Site(0, "mlp_out")).shape[1]


@torch.no_grad()
def at_anchor(lm, ids):
    with capture(lm, [Site(4)]) as seen:
        lm.model(input_ids=ids, use_cache=False)
    return seen[Site(4)][0, -1]


def test_cake_with_infinite_temperature_is_alphaedit_bit_for_bit(tiny, requests, quiet, build):
    before, results = bits(tiny), []
    for weighter in (
        Uniform(),
        Scores({1: 0.3, 2: 0.1, 4: 0.7}, tau=float("inf")),
        Scores({1: 1, 2: 9, 4: 5}, tau=0.5),
    ):
        tiny.model.load_state_dict(before)
        fit(build(tiny, weighter=weighter), requests, quiet)
        results.append(bits(tiny))
    assert all(torch.equal(results[0][name], results[1][name]) for name in before)
    assert not all(torch.equal(results[0][name], results[2][name]) for name in before)


def test_layers_of_weight_zero_are_untouched(tiny, requests, quiet, build):
    before = bits(tiny)
    module = build(tiny, weighter=OneHot(2))
    fit(module, requests, quiet, 12)
    assert [change.place for change in module.journal.changes] == [name_of(tiny, 2)]
    assert list(module.journal[0].values) == [2]  # the anchor is the last layer that is edited
    assert all(torch.equal(tiny.weight(Site(layer, "mlp_out")), before[name_of(tiny, layer)])
               for layer in (0, 1, 3, 4, 5))  # fmt: skip


def test_endpoints_with_targets_of_their_own(tiny, requests, quiet, build):
    module = build(tiny, weighter=Endpoints(), allocator=Sequential(0.0, "self"))
    fit(module, requests, quiet, 12)
    step = module.journal[0]
    assert [part.place for part in step.changes] == [name_of(tiny, 1), name_of(tiny, 4)]
    assert set(step.values) == {1, 4}
    first = step.changes[0].change.update.left  # the whole residual of the first layer's own targets
    with torch.no_grad():
        module.journal.rollback()
    result = TARGETS.search(tiny, module_batch(tiny, requests), 1)
    torch.testing.assert_close(first, result.values - result.initial, rtol=0, atol=1e-9)


def module_batch(lm, requests):
    return encode_batch(lm, requests, CONTEXTS)


class PerFact(Weighter):
    """Weights per fact: the first half edits only layer 1, the others only layer 4."""

    def weigh(self, lm, batch, layers):
        weights = torch.zeros(len(batch), len(layers), dtype=torch.float64)
        weights[: len(batch) // 2, 0] = 1
        weights[len(batch) // 2 :, 2] = 1
        return weights


def test_weights_per_fact(tiny, requests, quiet, build):
    """A fact whose weight at a layer is zero asks nothing of it."""
    module = build(tiny, weighter=PerFact())
    fit(module, requests, quiet, 12)
    first, second = module.journal.changes
    assert [first.place, second.place] == [name_of(tiny, 1), name_of(tiny, 4)]
    assert first.update.left[:6].norm(dim=1).min() > 0
    assert first.update.left[6:].norm() == 0
    assert second.update.left[6:].norm(dim=1).min() > 0
    assert torch.isfinite(second.update.left).all()


@pytest.mark.parametrize("role", ["mlp_out", "attn_out"])
def test_targets_at_other_sites(tiny, requests, quiet, build, role):
    module = build(tiny, targets=replace(TARGETS, site=role))
    fit(module, requests[:4], quiet, 4)
    assert [change.place for change in module.journal.changes] == [name_of(tiny, layer) for layer in LAYERS]


@pytest.mark.parametrize("history", [True, False])
def test_history_is_used_or_not(lm, requests, quiet, build, history):
    before = bits(lm)
    fit(build(lm, history=history), requests, quiet, 6)
    in_two, weight = bits(lm), lm.architecture.path(Site(1, "mlp_out")) + ".weight"
    lm.model.load_state_dict(before)
    module = build(lm, history=False)
    fit(module, requests[:6], quiet, 6)
    fit(module, requests[6:], quiet, 6)
    assert torch.equal(in_two[weight], lm.model.state_dict()[weight]) is (not history)


@pytest.mark.parametrize("epochs", [2, -1])
def test_more_than_one_epoch_is_refused(lm, requests, quiet, build, epochs):
    before = bits(lm)
    with pytest.raises(ConfigError, match="use max_epochs=1"):
        fit(build(lm), requests, quiet, max_epochs=epochs)
    assert same(lm, before)


class Failing(Solver):
    """Edits two layers, then fails."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def solve(self, problem):
        self.calls += 1
        if self.calls == 6:
            raise self.error
        return NullSpace(LeastSquares(0.5)).solve(problem)


@pytest.mark.parametrize("error", [NumericalError, KeyboardInterrupt])
def test_a_failing_batch_is_taken_back_and_those_before_stay(tiny, requests, quiet, build, error):
    before = bits(tiny)
    fit(build(tiny), requests[:6], quiet)
    after_first = bits(tiny)
    tiny.model.load_state_dict(before)
    module = build(tiny, solver=Failing(error("no")))
    with pytest.raises((error, SystemExit)):
        fit(module, requests, quiet)
    assert same(tiny, after_first)
    assert len(module.journal) == 1
    assert len(module.journal.history(name_of(module.lm, 1))) == 6
    module.journal.rollback()
    assert same(tiny, before)
    assert not [m for m in tiny.model.modules() if m._forward_hooks or "forward" in m.__dict__]


def test_targets_that_are_not_finite_leave_the_model_alone(lm, requests, quiet, build):
    before = bits(lm)
    with pytest.raises(NumericalError, match="request 0"):
        fit(build(lm, targets=replace(TARGETS, lr=float("inf"))), requests, quiet)
    assert same(lm, before)


class Memory(Logger):
    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)

    def log_hyperparams(self, *_args, **_kwargs):
        pass


def test_the_logger_receives_what_the_walk_did(lm, requests, quiet, build):
    logger = Memory()
    module = build(lm, weighter=Scores({1: 0.088, 2: 0.090, 4: 0.092}, tau=0.01))
    original = {layer: lm.weight(Site(layer, "mlp_out")).norm().item() for layer in LAYERS}
    fit(module, requests, quiet, logger=logger)
    for layer, part in zip(LAYERS, module.journal[0].changes, strict=True):
        norm = float(part.change.update.dense.norm())
        assert part.numbers["update"] == pytest.approx(norm, rel=1e-9)
        assert part.numbers["relative_update"] == pytest.approx(norm / original[layer], rel=1e-6)
        assert part.numbers.keys() == {"residual", "update", "relative_update", "share"}
    rows = [row for row in logger.rows if "n_eff" in row]
    assert len(rows) == 2
    for row in rows:
        assert 2.9 < row["n_eff"] < 3
        assert row["layer4/share"] == 1
        assert row["layer1/share"] < 1 / 3 < row["layer2/share"] < 0.5
        for layer in LAYERS:
            assert row[f"layer{layer}/residual"] > 0
            assert row[f"layer{layer}/update"] > 0
            assert 0 < row[f"layer{layer}/relative_update"] < 10
        assert row["target/steps"] == 4
        assert row["target/loss"] > 0
    assert module.timings["solve"] > 0


@pytest.mark.parametrize("layers", [[], [2, 1], [1, 1], [-1, 2], [4, 6]])
def test_bad_layers(lm, build, layers):
    with pytest.raises(ConfigError, match="layer"):
        build(lm, layers=layers)


def test_layers_added_after_edits_are_measured_on_the_unedited_model(lm, requests, quiet, build, tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(request.text for request in requests) * 20)
    statistics = Statistics(str(tmp_path / "corpus.txt"), tokens=300, window=20)
    module = build(lm, statistics=statistics)
    fit(module, requests[:6], quiet)
    expected = statistics.collect(copy.deepcopy(lm), [Site(4, "mlp_out")])[Site(4, "mlp_out")].moment  # once edited
    del module.covariances[4]
    fit(module, requests[6:], quiet)
    result = module.covariances[4].moment
    module.journal.rollback()
    assert torch.equal(result, statistics.collect(lm, [Site(4, "mlp_out")])[Site(4, "mlp_out")].moment)
    assert not torch.equal(result, expected)


def test_a_second_fit_goes_on_where_the_first_ended(lm, requests, quiet, build):
    before = bits(lm)
    fit(build(lm), requests, quiet, 6)
    at_once = bits(lm)
    lm.model.load_state_dict(before)
    module = build(lm)
    fit(module, requests[:6], quiet, 6)
    fit(module, requests[6:], quiet, 6)
    assert same(lm, at_once)


def test_the_walk_needs_no_gradients_and_leaves_none(lm, requests, quiet, build):
    fit(build(lm), requests, quiet)
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    assert all(parameter.requires_grad for parameter in lm.model.parameters())


@pytest.mark.real
def test_the_real_model_takes_an_edit_and_gives_it_back(smollm2, requests, quiet):
    width = smollm2.oriented(Site(0, "mlp_out")).shape[1]
    before = {layer: smollm2.weight(Site(layer, "mlp_out")).detach().clone() for layer in (10, 12)}
    module = module_of(
        smollm2, layers=[10, 12], solver=LeastSquares(1.0), targets=GradientSearch(steps=8, lr=0.5), contexts=CONTEXTS,
        moments=dict.fromkeys((10, 12), 1e-6 * torch.eye(width)),
    )  # fmt: skip
    trainer = fit(module, requests[:2], quiet, 2)
    try:
        assert trainer.callback_metrics["target/probability"] > 0.3
        assert all(not torch.equal(smollm2.weight(Site(layer, "mlp_out")), before[layer]) for layer in before)
    finally:
        module.journal.rollback()
    assert all(torch.equal(smollm2.weight(Site(layer, "mlp_out")), before[layer]) for layer in before)


def test_the_exact_allocation_in_the_walk(tiny, requests, quiet, build):
    """Every turn has a chain of the layers from its own on, and the walk can be taken back as ever."""
    seen = []

    class Watched(Jacobian):
        def allocate(self, residual, context):
            share = super().allocate(residual, context)
            seen.append((context.index, len(context.linear_map.vjp(residual)), residual, share))
            return share

    before, module = bits(tiny), build(tiny, allocator=Watched(tolerance=1e-6))
    fit(module, requests[:3], quiet)
    (_, _, residual, share), *_, (_, _, left, rest) = seen
    assert [(index, layers) for index, layers, *_ in seen] == [(0, 3), (1, 2), (2, 1)]
    assert torch.equal(left, rest)
    assert 0.1 < float(share.norm() / residual.norm()) < 0.6  # about a third, as the identity would have it,
    assert not torch.allclose(share, residual / 3, rtol=1e-3)  # but not exactly
    assert not same(tiny, before)
    module.journal.rollback()
    assert same(tiny, before)


@pytest.mark.parametrize("history", [True, False])
def test_a_problem_has_the_earlier_changes_of_its_weight_and_what_is_read_at_targets(
    lm, requests, quiet, build, history
):
    problems = []

    class Keep(EditCallback):
        def on_layer_solved(self, module, edit):
            problems.append((edit.problem, edit.problem.tokens()[0]))

    module = build(lm, history=history)
    L.Trainer(**quiet | {"callbacks": [Keep()]}).fit(module, datamodule=EditDataModule(requests[:6], 2))
    for number, (problem, inputs) in enumerate(problems):
        batch, layer = divmod(number, len(LAYERS))
        updates = [step.changes[layer].change.update for step in module.journal[:batch]]
        assert (problem.earlier is not None) == history
        assert all(a is b for a, b in zip(problem.earlier or (), updates if history else (), strict=True))
        texts = encode_batch(lm, requests[2 * batch : 2 * batch + 2], CONTEXTS)
        assert len(inputs) == sum(len(rows[0].ids) - rows[0].target for rows in texts.rows)


def test_the_end_of_the_text_is_the_last_token_of_every_target(lm, build, requests):
    plain, ended = (build(lm, end_of_text=end).encode(requests) for end in (False, True))
    for before, after in zip(plain.rows, ended.rows, strict=True):
        assert [(*row.ids, lm.tokenizer.eos_token_id) for row in before] == [row.ids for row in after]
