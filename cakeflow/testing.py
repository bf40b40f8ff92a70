"""Contracts of the slots as test classes: subclass one, give it your object, and pytest runs the checks.

    from cakeflow.testing import AllocatorContract
    from mylab import Halving

    class TestHalving(AllocatorContract):
        allocator = Halving()

Everything runs offline, on small random tensors and a tiny random model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from cakeflow.allocators.base import Allocator, LayerContext
from cakeflow.core.contracts import checked_residual, checked_update, checked_weights
from cakeflow.data.contexts import Contexts
from cakeflow.data.request import EditRequest
from cakeflow.evaluation.scoring import PromptScores
from cakeflow.forward.tokens import TextBatch, encode_batch
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture
from cakeflow.models.language import LanguageModel
from cakeflow.solvers.base import Solver
from cakeflow.solvers.covariance import Covariance
from cakeflow.solvers.history import KeyHistory
from cakeflow.solvers.problem import LayerProblem
from cakeflow.targets.base import Targets, TargetSearch
from cakeflow.targets.objective import Objective, ObjectiveTerm, ObjectiveValue, SearchProblem
from cakeflow.weighters.base import Weighter

SEEDS = range(5)


@dataclass(frozen=True)
class DenseLinearMap:
    """A ``LinearMap`` with explicit Jacobians.

    Attributes:
        matrices: Jacobian of each layer for each fact, n x d_out x d_out.
    """

    matrices: Sequence[Float[Tensor, "n d_out d_out"]]

    def vjp(self, covector: Float[Tensor, "n d_out"]) -> list[Float[Tensor, "n d_out"]]:
        """Apply the transposed Jacobian of each layer."""
        return [torch.einsum("nij,ni->nj", matrix, covector) for matrix in self.matrices]

    def jvp(self, tangents: Sequence[Float[Tensor, "n d_out"]]) -> Float[Tensor, "n d_out"]:
        """Apply the Jacobian of each layer and sum the results."""
        pairs = zip(self.matrices, tangents, strict=True)
        return torch.stack([torch.einsum("nij,nj->ni", matrix, tangent) for matrix, tangent in pairs]).sum(0)


class AllocatorContract:
    """Contract of ``Allocator`` and ``ShareAllocator``."""

    allocator: ClassVar[Allocator]
    tolerance: ClassVar[float] = 1e-9
    """Relative deviation from linearity; raise it for an allocator that solves iteratively."""

    def test_shares_fit_and_keep_the_contract(self) -> None:
        """The share is finite and has the residual's shape; shares lie in (0, 1], and the last layer takes the rest."""
        for context, residual in random_contexts():
            checked_residual(self.allocator, self.allocator.allocate(residual, context), residual, context)

    def test_it_is_linear_in_the_residual(self) -> None:
        """Twice the residual gives twice the share, and a sum of residuals the sum of their shares."""
        for context, residual in random_contexts():
            other = residual.flip(0).contiguous()
            together = self.allocator.allocate(2 * residual + other, context)
            apart = 2 * self.allocator.allocate(residual, context) + self.allocator.allocate(other, context)
            torch.testing.assert_close(together, apart, rtol=self.tolerance, atol=self.tolerance)

    def test_it_is_pure(self) -> None:
        """Equal arguments give equal shares, and stay as they are."""
        for context, residual in random_contexts():
            copies = residual.clone(), context.weights.clone()
            first, second = self.allocator.allocate(residual, context), self.allocator.allocate(residual, context)
            assert torch.equal(first, second)
            assert torch.equal(residual, copies[0])
            assert torch.equal(context.weights, copies[1])


class SolverContract:
    """Contract of ``Solver``."""

    solver: ClassVar[Solver]

    def test_updates_fit(self) -> None:
        """Updates are finite and have the shape of the weight."""
        for problem in random_problems():
            checked_update(self.solver, self.solver.solve(problem), problem, 0)

    def test_it_is_pure(self) -> None:
        """Equal problems give equal updates, and stay as they are."""
        for problem in random_problems():
            copies = [
                part.clone() for part in (problem.keys, problem.residual, problem.weight, problem.original_weight)
            ]
            assert torch.equal(self.solver.solve(problem).dense, self.solver.solve(problem).dense)
            now = problem.keys, problem.residual, problem.weight, problem.original_weight
            assert all(torch.equal(part, before) for part, before in zip(now, copies, strict=True))

    def test_the_order_of_facts_is_irrelevant(self) -> None:
        """A permutation of the facts gives the same update."""
        for problem in random_problems():
            keys, residual = problem.keys.flip(0), problem.residual.flip(0)
            prompt_keys = None if problem.prompt_keys is None else problem.prompt_keys.flip(0)
            flipped = replace(problem, keys=keys, residual=residual, prompt_keys=prompt_keys)
            torch.testing.assert_close(
                self.solver.solve(flipped).dense, self.solver.solve(problem).dense, rtol=1e-6, atol=1e-9
            )

    def test_a_zero_residual_changes_nothing(self) -> None:
        """The update of a zero residual is zero."""
        for problem in random_problems():
            solved = replace(problem, residual=torch.zeros_like(problem.residual))
            assert float(self.solver.solve(solved).dense.abs().max()) == 0

    def test_the_end_of_a_run_keeps_the_shape(self) -> None:
        """``finish`` returns a finite weight of the same shape."""
        for problem in random_problems():
            update = checked_update(self.solver, self.solver.solve(problem), problem, 0)
            final = self.solver.finish(problem.original_weight, problem.weight + update.dense)
            assert final.shape == problem.weight.shape
            assert bool(torch.isfinite(final).all())


class WeighterContract:
    """Contract of ``Weighter``."""

    weighter: ClassVar[Weighter]
    layers: ClassVar[Sequence[int]] = (0, 1, 2)

    def test_weights_fit_and_the_model_stays(self) -> None:
        """Weights have a valid shape, are finite and not negative; no bit of the model changes."""
        lm = tiny_model()
        before = {name: part.clone() for name, part in lm.model.state_dict().items()}
        batch = tiny_batch(lm)
        self.weighter.check(self.layers)
        ready = self.weighter.prepare(lm, self.layers)
        checked_weights(ready, ready.weigh(lm, batch, self.layers), len(batch), self.layers)
        assert all(torch.equal(part, before[name]) for name, part in lm.model.state_dict().items())


class TargetSearchContract:
    """Contract of ``TargetSearch``."""

    search: ClassVar[TargetSearch]
    layer: ClassVar[int] = 1
    tolerance: ClassVar[float] = 1e-6
    """Relative difference between searches of the same facts in batches or passes of another size."""

    def test_values_are_finite_and_fit_the_value_site(self) -> None:
        """One row per fact, as wide as the output of the value site."""
        lm = tiny_model(torch.float64)
        batch = tiny_batch(lm)
        present = _outputs(lm, batch, self.search.value_site(self.layer))
        targets = self.search.search(lm, batch, self.layer)
        assert targets.values.shape == targets.initial.shape == present.shape
        assert targets.values.dtype == targets.initial.dtype == torch.float64
        for numbers in (targets.loss, targets.probability, targets.steps, targets.converged):
            assert numbers.shape == (len(batch),)
        assert all(bool(torch.isfinite(numbers).all()) for numbers in vars(targets).values() if numbers is not None)

    def test_it_is_pure(self) -> None:
        """Equal searches give equal targets; the model keeps its bits, and no hook stays behind."""
        lm = tiny_model(torch.float64)
        before, batch = {name: part.clone() for name, part in lm.model.state_dict().items()}, tiny_batch(lm)
        for find in (self.search.search, self.search.measure):
            first, second = vars(find(lm, batch, self.layer)), vars(find(lm, batch, self.layer))
            assert all(value is None or torch.equal(value, second[name]) for name, value in first.items())
        assert all(torch.equal(part, before[name]) for name, part in lm.model.state_dict().items())
        assert all(part.grad is None and part.requires_grad for part in lm.model.parameters())
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in lm.model.modules())

    def test_facts_do_not_influence_each_other(self) -> None:
        """Parts of a batch get the values of the whole, and so do smaller passes."""
        lm = tiny_model(torch.float64)
        batch = tiny_batch(lm)
        whole = self.search.search(lm, batch, self.layer).values
        parts = Targets.join([self.search.search(lm, part, self.layer) for part in batch.split(2)]).values
        narrow = self.search.search(lm, batch, self.layer, max_tokens=1).values
        for values in (parts, narrow):
            assert float((values - whole).norm() / whole.norm()) < self.tolerance

    def test_measuring_returns_the_present_values(self) -> None:
        """They are the outputs of the value site at the last token of each subject in the bare prompt."""
        lm = tiny_model(torch.float64)
        batch = tiny_batch(lm)
        measured = self.search.measure(lm, batch, self.layer)
        present = _outputs(lm, batch, self.search.value_site(self.layer))
        assert torch.equal(measured.values, measured.initial)
        assert measured.steps.tolist() == [1] * len(batch)
        torch.testing.assert_close(measured.values, present.double(), rtol=self.tolerance, atol=self.tolerance)

    def test_progress_counts_every_fact_once(self) -> None:
        """The numbers of facts that became done add up to the batch."""
        lm = tiny_model(torch.float64)
        batch, counts = tiny_batch(lm), list[int]()
        self.search.search(lm, batch, self.layer, progress=counts.append)
        assert sum(counts) == len(batch)


class ObjectiveTermContract:
    """Contract of ``ObjectiveTerm`` and its ``PreparedTerm``."""

    term: ClassVar[ObjectiveTerm]

    def test_the_gradient_is_that_of_the_loss(self) -> None:
        """Finite numbers, the same ones twice, and the slope along a random direction."""
        problem = _random_search()
        delta, direction = torch.randn(2, *problem.initial.shape, generator=_generator(1), dtype=torch.float64)
        value, again = (self.evaluate(problem, delta) for _ in range(2))
        assert bool(torch.isfinite(value.loss).all())
        assert torch.equal(value.loss, again.loss)
        assert torch.equal(value.grad, again.grad)
        ahead, behind = (self.evaluate(problem, delta + step * direction).loss for step in (1e-5, -1e-5))
        torch.testing.assert_close((value.grad * direction).sum((1, 2)), (ahead - behind) / 2e-5, rtol=1e-4, atol=1e-7)

    def test_facts_do_not_influence_each_other(self) -> None:
        """Other facts may be done, or their vectors change: a fact keeps its loss and its gradient."""
        problem, mine = _random_search(), torch.tensor([False, True, False])
        delta, other = torch.randn(2, *problem.initial.shape, generator=_generator(2), dtype=torch.float64)
        value = self.evaluate(problem, delta)
        moved = self.evaluate(problem, torch.where(mine[:, None, None], delta, other))
        alone = Objective({"term": self.term.prepare(problem)}).only(mine).evaluate(delta, ~mine, with_grad=True)
        for each in (moved, alone):
            torch.testing.assert_close(each.loss[1], value.loss[1], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(each.grad[1], value.grad[1], rtol=1e-6, atol=1e-9)

    def evaluate(self, problem: SearchProblem, delta: Tensor) -> ObjectiveValue:
        """Compute the term by itself, with its gradient, for facts of which all but one are solved."""
        solved = torch.tensor([True, False, True])
        return Objective({"term": self.term.prepare(problem)}).evaluate(delta, solved, with_grad=True)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random_search() -> SearchProblem:
    lm = tiny_model(torch.float64)
    lm.model.requires_grad_(False)
    return SearchProblem.prepare(lm, tiny_batch(lm), [Site(1)], 20)


@torch.no_grad()
def _outputs(lm: LanguageModel, batch: TextBatch, site: Site) -> Float[Tensor, "n width"]:
    """Present output of a site at the last token of each subject, from full passes over the bare prompts."""
    outputs = []
    for row, *_ in batch.rows:
        with capture(lm, [site]) as outputs_by_site:
            lm(input_ids=torch.tensor([row.ids]))
        outputs.append(outputs_by_site[site][0, row.subject])
    return torch.stack(outputs)


class MetricContract:
    """Contract of metrics, which get ``PromptScores`` in parts of whole records."""

    metric: ClassVar[Metric]

    def test_parts_add_up(self) -> None:
        """Several updates, in any order, give the value of one update with everything."""
        for scores in random_scores():
            whole, parts = self.value(scores), [_records(scores, range(4)), _records(scores, range(4, 9))]
            assert bool(torch.isfinite(whole).all())
            torch.testing.assert_close(self.value(*parts), whole)
            torch.testing.assert_close(self.value(*reversed(parts)), whole)

    def test_a_reset_forgets(self) -> None:
        """Updates before a reset have no influence."""
        metric = copy.deepcopy(self.metric)
        for scores in random_scores():
            metric.reset()
            _feed(metric, scores)
            torch.testing.assert_close(metric.compute(), self.value(scores))

    def test_devices_join(self) -> None:
        """The states of two processes merge to the state of one (``dist_reduce_fx``)."""
        for scores in random_scores():
            metric, other = copy.deepcopy(self.metric), copy.deepcopy(self.metric)
            _feed(metric, _records(scores, range(4)))
            _feed(other, _records(scores, range(4, 9)))
            metric.merge_state(other)
            torch.testing.assert_close(metric.compute(), self.value(scores))

    def value(self, *parts: PromptScores) -> Tensor:
        """Return the metric's value after some updates."""
        metric = copy.deepcopy(self.metric)
        metric.reset()
        for part in parts:
            _feed(metric, part)
        return metric.compute()  # type: ignore[no-any-return]


def _feed(metric: Metric, scores: PromptScores) -> None:
    """Update a metric as evaluations do: with the fields that its ``update`` names."""
    MetricCollection(metric).update(**vars(scores))


def random_scores() -> Iterator[PromptScores]:
    """Yield scores of nine records with prompts of every kind; every third record has no rival."""
    for seed in SEEDS:
        gen = torch.Generator().manual_seed(seed)
        record = torch.arange(9).repeat_interleave(6)
        kind = torch.tensor([0, 1, 1, 2, 2, 2]).repeat(9)
        expected, rival = -5 * torch.rand(2, 54, generator=gen)
        rival[record % 3 == 2] = torch.nan
        tokens, answered = torch.rand(54, generator=gen), torch.rand(54, generator=gen).round()
        yield PromptScores(expected, rival, tokens > 0.5, tokens, answered, record, kind)


def _records(scores: PromptScores, some: range) -> PromptScores:
    chosen = torch.tensor([int(each) in some for each in scores.record])
    return PromptScores(**{name: value[chosen] for name, value in vars(scores).items()})


def random_contexts() -> Iterator[tuple[LayerContext, Float[Tensor, "n d_out"]]]:
    """Yield layer contexts and residuals of several models, with weights for all facts together and fact by fact."""
    for seed in SEEDS:
        gen = torch.Generator().manual_seed(seed)
        n, width, layers = 3, 4, seed + 1
        for shape in ((layers,), (n, layers)):
            weights = torch.rand(shape, generator=gen, dtype=torch.float64) + 0.1
            eye = torch.eye(width, dtype=torch.float64)
            noise = 0.1 * torch.randn(layers, n, width, width, generator=gen, dtype=torch.float64)
            matrices = [*(eye + each for each in noise[1:]), eye.expand(n, -1, -1)]
            for index in range(layers):
                context = LayerContext(
                    Site(index, "mlp_out"), Site(layers - 1), index, weights, DenseLinearMap(matrices[index:])
                )
                yield context, torch.randn(n, width, generator=gen, dtype=torch.float64)


def random_problems() -> Iterator[LayerProblem]:
    """Yield problems with and without a history; some directions of the second moment are nearly null."""
    for seed in SEEDS:
        gen = torch.Generator().manual_seed(seed)
        n, d_in, d_out = 3, 8, 5
        normal = [torch.randn(rows, d_in, generator=gen, dtype=torch.float64) for rows in (n, 2, d_in, d_out)]
        keys, earlier, basis, weight = normal
        vectors = torch.linalg.qr(basis).Q
        values = torch.tensor([1e-4] * 4 + [1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
        covariance = Covariance((vectors * values) @ vectors.T, weight=2.0)
        residual = torch.randn(n, d_out, generator=gen, dtype=torch.float64)
        history = KeyHistory(earlier) if seed % 2 else KeyHistory()
        yield LayerProblem(keys, residual, weight, weight.clone(), covariance, history, keys + 0.1)


def tiny_model(dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Build a random GPT-2 of three blocks with a byte-level tokenizer, offline."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<end>": 0} | {c: i for i, c in enumerate(alphabet, 1)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = GPT2Config(vocab_size=257, n_positions=128, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    return LanguageModel.wrap(model.eval().type(dtype), fast)


def tiny_batch(lm: LanguageModel) -> TextBatch:
    """Encode three facts."""
    names = ("Ann", "Bob", "Cleo")
    requests = [
        EditRequest(prompt="{} lives in", subject=name, target_new="Rome", target_true="Oslo") for name in names
    ]
    return encode_batch(lm, requests, Contexts())
