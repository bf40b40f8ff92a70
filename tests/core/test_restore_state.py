"""Nothing but the edited weights changes: whatever was done, and however it ended."""

import logging
import os
import random
import signal
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import sklearn.feature_extraction.text  # noqa: F401 (its first import sets variables of the environment)
import torch

from cakeflow import Contexts, Editor, GradientSearch, LeastSquares, Probe, Statistics
from cakeflow.callbacks import NeutralText, Retention
from cakeflow.core.callback import EditCallback
from cakeflow.evaluation.evaluation import Evaluation
from cakeflow.forward.generation import generate_contexts
from cakeflow.forward.tokens import encode_batch
from cakeflow.metrics import Efficacy
from cakeflow.models.architecture import Site
from cakeflow.tracing import CausalTrace

LAYERS = [1, 4]
TEXT = "The quick brown fox jumps over the lazy dog. " * 60


def observed(lm):
    """Everything about a model and a process that an edit could leave behind, as comparable values by name."""
    seen = dict(_of_the_process())
    tokenizer = lm.tokenizer
    backend = tokenizer.backend_tokenizer
    seen["tokenizer"] = (
        tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token, backend.truncation, backend.padding,
        tokenizer.model_max_length, len(tokenizer),
    )  # fmt: skip
    seen["config"], seen["generation"] = lm.model.config.to_dict(), lm.model.generation_config.to_dict()
    for name, module in lm.model.named_modules():
        hooks = {key: list(value) for key, value in vars(module).items() if key.endswith("_hooks") and value}
        seen[f"module {name}"] = module.training, hooks, sorted(set(vars(module)) - {"_is_full_backward_hook"})
    for name, weight in lm.model.named_parameters():
        seen[f"weight {name}"] = weight.requires_grad, weight.dtype, weight.device, weight.data_ptr()
        seen[f"gradient {name}"] = None if weight.grad is None else weight.grad.tolist()
    return seen


def _of_the_process():
    yield "torch's generator", torch.get_rng_state().tolist()
    yield "numpy's generator", repr(np.random.get_state())
    yield "python's generator", random.getstate()
    yield "gradients on", (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled())
    yield "numbers", (torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision())
    yield "deterministic", (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic,
    )  # fmt: skip
    yield "warnings", list(warnings.filters)
    yield "signals", {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield (
        "logs",
        {name: logging.getLogger(name).level for name in ("", "cakeflow", "lightning.pytorch", "transformers")},
    )
    yield "streams", (sys.stdout, sys.stderr, sys.excepthook)
    yield "environment", {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    yield (
        "hooks of all modules",
        [
            len(hooks)
            for name, hooks in vars(torch.nn.modules.module).items()
            if name.startswith("_global_") and name.endswith("_hooks")
        ],
    )


def weights(lm):
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def compare(lm, before):
    now = observed(lm)
    assert {name: (before.get(name), now.get(name)) for name in before | now if before.get(name) != now.get(name)} == {}


class Failure:
    """Raises an error the ``at``-th time that it is called."""

    def __init__(self, error=None, at=1):
        self.error, self.at, self.calls = error, at, 0

    def __call__(self, *_):
        self.calls += 1
        if self.error is not None and self.calls == self.at:
            raise self.error


@dataclass(frozen=True)
class FailingSolver(LeastSquares):
    """Fails when it is told to."""

    fail: Failure = field(default_factory=Failure)

    def solve(self, problem):
        self.fail()
        return super().solve(problem)


@dataclass(frozen=True)
class FailingSearch(GradientSearch):
    """Fails while it searches."""

    fail: Failure = field(default_factory=Failure)

    def search(self, lm, batch, layer, *, max_tokens=None, progress=None):
        return super().search(lm, batch, layer, max_tokens=max_tokens, progress=self.fail)


class FailingCallback(EditCallback):
    """Fails in one of its hooks."""

    def __init__(self, hook, fail):
        setattr(self, hook, fail)


class FailingMetric(Efficacy):
    """Fails when it is told to."""

    def __init__(self, fail):
        super().__init__()
        self.fail = fail

    def update(self, expected, rival, correct, record, kind):
        self.fail()
        super().update(expected, rival, correct, record, kind)


def as_the_user_left_it(lm, changes):
    """A model in some state of the user's, and generators in the middle of a sequence."""
    if "train" in changes:
        lm.model.train()
        lm.module(Site(2)).eval()
        for module in filter(lambda module: isinstance(module, torch.nn.Dropout), lm.model.modules()):
            module.p = 0.5
    if "frozen" in changes:
        for number, weight in enumerate(lm.model.parameters()):
            weight.requires_grad_(number % 3 == 0)
            weight.grad = torch.full_like(weight, 2.0)
    if "tokenizer" in changes:
        lm.tokenizer.padding_side, lm.tokenizer.truncation_side = "left", "left"
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    torch.rand(3), np.random.rand(3), random.random()


def edit(lm, requests, quiet, tmp_path, **parts):
    """Edit through the facade with much of what a run can have, then take it back."""
    (tmp_path / "text.txt").write_text(TEXT)
    watchers = [Retention(), NeutralText(tmp_path / "text.txt", tokens=64, window=16), *parts.pop("callbacks", [])]
    settings = {
        "layers": LAYERS,
        "contexts": Contexts.of(["{}", "I am. {}"]),
        "moments": dict.fromkeys(LAYERS, torch.eye(lm.oriented(Site(0, "mlp_out")).shape[1], dtype=torch.float64)),
        "targets": {"steps": 2, "lr": 0.3},
        "solver": {"class_path": "LeastSquares"},
        "evaluation": Evaluation(texts_every=1, answer_tokens=2),
    }
    editor = Editor.from_pretrained(
        lm.model, "memit", tokenizer=lm.tokenizer, trainer=quiet | {"callbacks": watchers}, **(settings | parts)
    )
    try:
        asking = [replace(r, probes=(*r.probes, Probe("generation", f"{r.subject} is"))) for r in requests[:4]]
        editor.fit(asking[:2], 1)
        editor.evaluate(asking[2:])
    finally:
        editor.rollback()


STATES = [(), ("train",), ("frozen",), ("tokenizer",)]


@pytest.mark.parametrize("changes", STATES, ids=lambda names: "+".join(names) or "as loaded")
def test_an_edit_and_its_rollback(tiny, requests, quiet, tmp_path, changes):
    as_the_user_left_it(tiny, changes)
    before, kept = observed(tiny), weights(tiny)
    edit(tiny, requests, quiet, tmp_path)
    compare(tiny, before)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in tiny.model.state_dict().items())


ERRORS = (RuntimeError("no"), KeyboardInterrupt(), SystemExit(3), torch.OutOfMemoryError("none left"))
PLACES = ("solver", "search", "metric before", "metric after", "watcher", "start", "batch end")
FAILURES = [(where, error) for where in PLACES for error in ERRORS[: 4 if where in ("solver", "metric after") else 2]]


@pytest.mark.parametrize(("where", "error"), FAILURES, ids=lambda each: each if each in PLACES else type(each).__name__)
def test_an_edit_that_fails(lm, requests, quiet, tmp_path, where, error):
    """Solver and watcher fail in the second of two batches; the metric is asked before them and after."""
    fail = Failure(error, {"metric after": 2, "watcher": 3, "solver": 3}.get(where, 1))
    parts = {
        "solver": {"solver": FailingSolver(fail=fail)},
        "search": {"targets": FailingSearch(steps=2, lr=0.3, fail=fail)},
        "metric before": {"metrics": [FailingMetric(fail)]},
        "metric after": {"metrics": [FailingMetric(fail)]},
        "watcher": {"callbacks": [FailingCallback("on_layer_solved", fail)]},
        "start": {"callbacks": [FailingCallback("on_fit_start", fail)]},
        "batch end": {"callbacks": [FailingCallback("on_train_batch_end", fail)]},
    }[where]
    as_the_user_left_it(lm, ("train", "frozen", "tokenizer"))
    before, kept = observed(lm), weights(lm)
    with pytest.raises(type(error)):
        edit(lm, requests, quiet, tmp_path, **parts)
    compare(lm, before)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in lm.model.state_dict().items())


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("what", ["trace", "statistics", "contexts", "targets"])
def test_what_runs_without_a_trainer(tiny, rows, requests, tmp_path, what, interrupted):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    def run():
        if what == "trace":
            CausalTrace(draws=2).run(tiny, rows, [1, 2])
        elif what == "statistics":
            Statistics(source=text, tokens=512, window=32).collect(tiny, [Site(1, "mlp_out"), Site(2, "mlp_out")])
        elif what == "contexts":
            generate_contexts(tiny)
        else:
            GradientSearch(steps=2).search(tiny, encode_batch(tiny, requests[:2], Contexts()), 3)

    as_the_user_left_it(tiny, ("train", "frozen", "tokenizer"))
    before = observed(tiny)
    if interrupted:
        with stopped_at(tiny, 1 if what == "statistics" else 3), pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
    compare(tiny, before)


@contextmanager
def stopped_at(lm, number):
    """The model is interrupted in its forward pass of that number."""
    handle = lm.module(Site(0)).register_forward_hook(Failure(KeyboardInterrupt(), number))
    try:
        yield
    finally:
        handle.remove()


def test_the_numbers_are_those_of_evaluation_mode(lm, requests, quiet, tmp_path):
    """A model handed over in training mode is edited as one in evaluation mode is: dropout plays no part."""
    target = GradientSearch(steps=3, lr=0.3)
    batch = encode_batch(lm, requests[:2], Contexts())
    expected = target.search(lm, batch, 3).values
    as_the_user_left_it(lm, ("train",))
    assert torch.equal(target.search(lm, batch, 3).values, expected)
