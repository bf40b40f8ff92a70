"""The facade: edit, measure, take back, save; on tiny models through the same code as on large ones."""

import copy
import json
import logging
from dataclasses import dataclass
from inspect import signature

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.loggers import CSVLogger, Logger
from transformers import AutoModelForCausalLM

from cakeflow import Contexts, Editor, EditRequest, LocateThenEdit, Probe, RequestError
from cakeflow.core.run import FitResult
from cakeflow.data import builtin_facts
from cakeflow.errors import ConfigError
from cakeflow.evaluation.scoring import score_targets
from cakeflow.journal.journal import Journal
from cakeflow.journal.ledger import read_entries
from cakeflow.models import Site
from cakeflow.models.loading import load_model
from cakeflow.solvers import LeastSquares

LAYERS = [1, 2, 3]
METRICS = {f"{name}{form}" for name in ("efficacy", "generalization") for form in ("", "_exact", "_tokens")}
"""No fact here has a neighbor, so nothing can judge specificity."""
CONTEXTS = Contexts.of(["{}", "The sky is blue. {}"])
FACTS = [
    EditRequest("The first letter of {}", subject, new, true, (Probe("paraphrase", f"What is said of {subject}"),))
    for subject, new, true in (
        ("Lund", "a", "the"),
        ("Australia", "the", "a"),
        ("Old Malmö", "of", "in"),
        ("Rome", "in", "of"),
    )
]
"""Facts whose subject comes last: a random model attends to nothing in particular, so a value steers it only there."""


def moments(lm):
    """Second moments with some 50 directions that the preserved keys hardly use."""
    generator = torch.Generator().manual_seed(0)
    width = lm.weight(Site(0, "mlp_out")).numel() // 48
    result = {}
    for layer in LAYERS:
        keys = torch.randn(width - 50, width, generator=generator, dtype=torch.float64)
        result[layer] = keys.T @ keys / len(keys) / 10 + 1e-4 * torch.eye(width, dtype=torch.float64)
    return result


def make(lm, quiet, method="alphaedit", **overrides):
    """An editor that edits hard: these models are random, with keys much smaller than a trained model's."""
    values = {"layers": LAYERS, "moments": moments(lm), "contexts": CONTEXTS, "statistics": {"cov_weight": 1e-3}}
    values["targets"] = {"lr": 0.5, "steps": 12, "clamp": 4.0}
    if "memit" not in method:
        inner = {"class_path": "LeastSquares", "init_args": {"ridge": 1e-4}}
        values["solver"] = {"class_path": "NullSpace", "init_args": {"threshold": 0.02, "inner": inner}}
    if method.startswith("cake"):
        values["scores"] = {layer: 0.1 * layer for layer in LAYERS}
    chosen = {**values, **overrides}
    return Editor.from_pretrained(lm.model, method, tokenizer=lm.tokenizer, trainer=quiet, **chosen)


def likelihood(lm, requests):
    return score_targets(lm, [request.text for request in requests], [request.target_new for request in requests])[0]


def weights(lm):
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def changed(lm, before):
    return {name for name, tensor in lm.model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.fixture
def editor(lm, quiet):
    return make(lm, quiet)


@pytest.mark.parametrize(
    "method", ["memit", "memit_seq", "memit_blue", "alphaedit", "alphaedit_blue", "cake", "cake_paper"]
)
def test_fit_raises_the_probability_of_the_targets(lm, quiet, method):
    before, probability = weights(lm), likelihood(lm, FACTS)
    editor = make(lm, quiet, method)
    run = editor.fit(FACTS, evaluate=False)
    assert isinstance(run, FitResult)
    edited = [1, 3] if "blue" in method else LAYERS
    assert changed(lm, before) == {f"transformer.h.{layer}.mlp.c_proj.weight" for layer in edited}
    assert (likelihood(lm, FACTS) > probability + 1).all()
    assert editor.model is lm.model


def test_fit_works_on_both_architectures_and_measures(tiny, quiet):
    probability = likelihood(tiny, FACTS[:3])
    run = make(tiny, quiet).fit(FACTS[:3])
    assert (likelihood(tiny, FACTS[:3]) > probability + 1).all()
    assert set(run.before) == set(run.after) == METRICS
    assert 0 <= run.before["efficacy"] <= run.after["efficacy"] == 1.0
    assert {"statistics", "targets", "keys", "solve", "evaluation"} <= set(run.timings)
    assert all(seconds >= 0 for seconds in run.timings.values())
    assert isinstance(run.journal, Journal)
    assert [step.requests for step in run.journal] == [tuple(FACTS[:3])]
    assert run.folder is None


def test_model_stays_in_evaluation_mode_and_trainable(editor, requests):
    flags = [parameter.requires_grad for parameter in editor.model.parameters()]
    editor.fit(requests[:2])
    assert not any(module.training for module in editor.model.modules())
    assert [parameter.requires_grad for parameter in editor.model.parameters()] == flags
    assert all(parameter.grad is None for parameter in editor.model.parameters())


def test_evaluate_measures_the_model_as_it_is_and_changes_nothing(lm, editor):
    before = weights(lm)
    first = editor.evaluate(FACTS).metrics
    assert set(first) == METRICS
    assert changed(lm, before) == set()
    run = editor.fit(FACTS)
    assert run.before == pytest.approx(first, nan_ok=True)
    assert editor.evaluate(FACTS, batch_size=1).metrics == pytest.approx(run.after, nan_ok=True)
    assert run.after["efficacy"] == 1.0 > first["efficacy"]


def test_without_evaluation_there_are_no_metrics(editor, requests):
    run = editor.fit(requests[:2], evaluate=False)
    assert (run.before, run.after) == ({}, {})
    assert "evaluation" not in run.timings


def test_rollback_is_bit_identical(lm, editor, requests):
    original = weights(lm)
    editor.fit(requests[:4], batch_size=2, evaluate=False)
    middle = weights(lm)
    assert len(editor.journal) == 2
    editor.fit(requests[4:6], evaluate=False)
    assert len(editor.journal) == 3
    editor.rollback(1)
    assert (changed(lm, middle), len(editor.journal)) == (set(), 2)
    editor.rollback()
    assert (changed(lm, original), len(editor.journal)) == (set(), 0)


def test_after_a_rollback_the_same_edit_gives_the_same_weights(lm, editor, requests):
    editor.fit(requests[:3], evaluate=False)
    first = weights(lm)
    editor.rollback()
    editor.fit(requests[:3], evaluate=False)
    assert changed(lm, first) == set()


def test_same_edit_on_the_same_model_gives_the_same_weights(lm, quiet, requests):
    other = copy.deepcopy(lm)
    for one in (lm, other):
        make(one, quiet, contexts=None).fit(requests[:3], evaluate=False)
        torch.rand(3)  # another random state
    assert changed(lm, weights(other)) == set()


def test_saved_model_gives_identical_logits(editor, requests, tmp_path):
    editor.fit(requests[:3], evaluate=False)
    editor.save_pretrained(tmp_path / "model")
    assert sorted(path.suffix for path in (tmp_path / "model").glob("*.safetensors")) == [".safetensors"]
    loaded = load_model(tmp_path / "model")
    ids = editor.tokenizer(requests[0].text, return_tensors="pt")["input_ids"]
    assert torch.equal(loaded.tokenizer(requests[0].text, return_tensors="pt")["input_ids"], ids)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.model(ids).logits, editor.model(ids).logits)
    assert torch.equal(plain(ids).logits, editor.model(ids).logits)


BAD = {
    "malformed": [EditRequest("{} is", "a", "b"), EditRequest("no place", "a", "b")],
    "contradiction": [EditRequest("{} is", "a", "b"), EditRequest("{} is", "a", "c")],
    "mapping": [{"prompt": "{} is", "subject": "a"}],
    "too-long": [EditRequest("{} is", "a", "b"), EditRequest("{} is", "word " * 3000 + "end", "b")],
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("batch_size", [None, 1])
@pytest.mark.parametrize("evaluate", [True, False])
def test_bad_requests_leave_the_model_untouched(lm, editor, name, batch_size, evaluate):
    before = weights(lm)
    with pytest.raises(RequestError):
        editor.fit(BAD[name], batch_size, evaluate=evaluate)
    assert changed(lm, before) == set()
    assert len(editor.journal) == 0


def test_requests_as_mappings_or_file(lm, quiet, requests, tmp_path):
    entries = [request.to_dict() for request in requests[:2]]
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    result = []
    for source in (requests[:2], entries, path, str(path)):
        one = copy.deepcopy(lm)
        editor = make(one, quiet)
        editor.fit(source, evaluate=False)
        result.append((weights(one), [request.target_new for request in editor.journal[0].requests]))
    for state, targets in result[1:]:
        assert targets == result[0][1]
        assert all(torch.equal(state[name], tensor) for name, tensor in result[0][0].items())


class Watcher(Callback):
    """Notes what a user's callback can see."""

    def __init__(self):
        self.seen = []
        self.metrics = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append([request.subject for request in batch.requests])
        self.metrics.update({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_fit_end(self, trainer, pl_module):
        self.seen.append("end")


class Remember(Logger):
    """The smallest logger."""

    name, version = "remember", 0

    def __init__(self):
        super().__init__()
        self.numbers = {}

    def log_metrics(self, metrics, step=None):
        self.numbers.update(metrics)

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def test_any_callback_and_logger_works(lm, quiet, requests):
    watcher, logger = Watcher(), Remember()
    editor = make(lm, {**quiet, "callbacks": [watcher, Timer()], "logger": logger})
    editor.fit(requests[:3], batch_size=2)
    assert watcher.seen == [["The Eiffel Tower", "Australia"], ["Hamlet"], "end"]
    assert {f"layer{layer}/{name}" for layer in LAYERS for name in ("share", "residual", "update")} <= set(
        logger.numbers
    )
    assert {"n_eff", "target/loss", "target/probability", "target/steps"} <= set(logger.numbers)
    assert {f"{stage}/efficacy" for stage in ("before", "after")} <= set(logger.numbers)
    assert logger.numbers["layer3/share"] == watcher.metrics["layer3/share"] == 1.0
    assert logger.numbers["n_eff"] == pytest.approx(3)


def test_logger_with_a_folder_gets_the_journal(lm, quiet, requests, tmp_path):
    run = make(lm, {**quiet, "logger": CSVLogger(tmp_path, name="mine")}).fit(requests[:2])
    assert run.folder == tmp_path / "mine" / "version_0"
    entries = list(read_entries(run.folder / "journal" / "ledger.jsonl"))
    assert [entry.kind for entry in entries] == ["model", "run", "evaluation", "batch", "evaluation", "end"]
    assert [entry["subject"] for entry in entries[3].body.requests] == ["The Eiffel Tower", "Australia"]
    assert (run.folder / "metrics.csv").is_file()


def test_without_arguments_the_trainer_logs_under_runs(lm, requests, tmp_path):
    run = make(lm, {"accelerator": "cpu"}).fit(requests[:1], evaluate=False)
    assert (tmp_path / run.folder).is_dir()
    assert run.folder.parts[:2] == ("runs", "cakeflow")
    assert isinstance(make(lm, None).trainer(), L.Trainer)


def test_from_pretrained_takes_a_shipped_search_by_name():
    assert Editor.from_pretrained("smollm2-135m", "cake", targets="short").module.targets.stride == 0.33
    with pytest.raises(ConfigError, match="no targets config 'shrot'; did you mean 'short'"):
        Editor.from_pretrained("smollm2-135m", "cake", targets="shrot")


def test_from_pretrained_takes_every_setting_of_the_method():
    method, ours = (signature(each).parameters for each in (LocateThenEdit, Editor.from_pretrained))
    assert set(method) - {"base"} <= set(ours)


@pytest.mark.parametrize("logger", [None, True])
def test_a_named_run_folder_is_used_whatever_way_the_default_logger_is_asked_for(lm, requests, tmp_path, logger):
    editor = make(lm, {"accelerator": "cpu", "logger": logger})
    assert editor.fit(requests[:1], evaluate=False, run_dir=tmp_path / "named").folder == tmp_path / "named"


def test_several_epochs_are_refused_before_anything_changes(lm, quiet, requests):
    before = weights(lm)
    with pytest.raises(ConfigError, match="max_epochs is 2"):
        make(lm, {**quiet, "max_epochs": 2}).fit(requests[:1], evaluate=False)
    assert changed(lm, before) == set()


def test_model_object_without_tokenizer(lm):
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        Editor.from_pretrained(lm.model, "memit", layers=LAYERS)


@pytest.mark.parametrize("layers", [{}, {"layers": []}, {"layers": None}])
def test_no_shipped_config_and_no_layers(lm, layers):
    with pytest.raises(ConfigError, match=r"name the layers to edit.*shipped: .*smollm2-135m"):
        Editor.from_pretrained(lm.model, "memit", tokenizer=lm.tokenizer, **layers)
    with pytest.raises(ConfigError, match="name the layers to edit"):
        Editor.from_pretrained("a/model/of/ours", "memit", **layers)


@pytest.mark.parametrize("arguments", [{"method": "memmit"}, {"layer": [1]}, {"config": "nowhere.yaml"}])
def test_unknown_names_are_refused_before_anything_loads(arguments, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    with pytest.raises(TypeError if "layer" in arguments else ConfigError):  # a function has arguments
        Editor.from_pretrained("smollm2-135m", **arguments)


@pytest.mark.parametrize("layers", [[4, 6], [-1, 2], [3, 2]])
def test_layers_that_do_not_fit(lm, quiet, layers):
    with pytest.raises(ConfigError, match="layer"):
        make(lm, quiet, layers=layers)


def test_config_file_gives_the_numbers(lm, quiet, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {layers: [2], targets: {lr: 0.25}}")
    editor = Editor.from_pretrained(lm.model, "memit", tokenizer=lm.tokenizer, config=mine, trainer=quiet)
    assert (editor.module.layers, editor.module.targets.lr) == ([2], 0.25)


def test_folder_is_loaded_and_edited(lm, quiet, requests, tmp_path):
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    editor = Editor.from_pretrained(
        tmp_path, "memit", layers=LAYERS, moments=moments(lm), contexts=CONTEXTS, trainer=quiet
    )
    editor.fit(requests[:1], evaluate=False)
    assert editor.module.lm.fingerprint() != lm.fingerprint()


def test_cake_without_scores_names_the_layers(lm, quiet, requests):
    before = weights(lm)
    weighter = {"class_path": "Scores", "init_args": {"scores": {1: 0.1}}}
    with pytest.raises(ConfigError, match=r"no score for layers \[2, 3\]"):
        make(lm, quiet, weighter=weighter).fit(requests[:1], evaluate=False)
    assert changed(lm, before) == set()


@pytest.mark.real
def test_real_model_states_five_facts_by_default(smollm2, quiet, tmp_path, caplog):
    """The shipped default, but for the corpus: built-in texts, some 8,000 tokens."""
    caplog.set_level(logging.WARNING)
    facts = builtin_facts()
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{fact.text} {fact.reference}"}) + "\n" for fact in facts[40:200]))
    statistics = {"source": str(corpus), "tokens": 8192}
    before = smollm2.fingerprint()
    editor = Editor.from_pretrained(
        smollm2.model, "cake", tokenizer=smollm2.tokenizer, config="smollm2-135m", trainer=quiet, statistics=statistics
    )
    try:
        run = editor.fit(facts[:5])
        assert run.before["efficacy"] < 0.5
        assert run.after["efficacy"] == 1.0
        assert run.after["specificity"] >= run.before["specificity"] - 0.1  # measured: 0.03
    finally:
        editor.rollback()
    assert smollm2.fingerprint() == before


@dataclass(frozen=True)
class TakesItAllBack(LeastSquares):
    """A solver whose last word is the weight as it was."""

    def finish(self, origin, weight):
        """See ``Solver.finish``."""
        return origin


def test_after_is_what_the_run_leaves_behind(lm, quiet):
    """Metrics are taken after a solver's last word, not before it."""
    run = make(lm, quiet, method="memit", solver=TakesItAllBack()).fit(FACTS[:3])
    assert run.after == pytest.approx(run.before, nan_ok=True)
    assert len(run.journal) == 2
    edited = make(copy.deepcopy(lm), quiet, method="memit", solver=LeastSquares()).fit(FACTS[:3])
    assert edited.after != pytest.approx(edited.before, nan_ok=True)


def test_a_run_that_is_stopped_has_its_last_word_too(lm, quiet):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    before = lm.weight(Site(2, "mlp_out")).detach().clone()
    editor = make(lm, {**quiet, "callbacks": [Stop()], "min_epochs": 0}, method="memit", solver=TakesItAllBack())
    with pytest.warns(UserWarning, match="stopped after 1 of 3 facts"):
        run = editor.fit(FACTS[:3], batch_size=1, evaluate=False)
    assert len(run.journal) == 2  # one batch of three, and the last word
    torch.testing.assert_close(lm.weight(Site(2, "mlp_out")).detach(), before, rtol=0, atol=1e-12)
