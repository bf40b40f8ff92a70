"""A model sharded over ranks is edited to the bits of a whole one by FSDP2, to a rounding by tensor parallelism."""

import copy
import os
import signal
from datetime import timedelta

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from many_ranks import in_ranks
from rank_runs import CONTEXTS, QUIET, edits, errors, ledger, outcome, results, weights
from safetensors.torch import load_file
from stops import STOPS
from tiny_runs import editor_of, module_of

from cakeflow import Editor, Scores
from cakeflow.callbacks import NeutralText, OutcomeCheck
from cakeflow.cli.command_line import run_command
from cakeflow.core.strategy import RankStrategy, check_ranks
from cakeflow.errors import ArchitectureError, ConfigError, RanksError
from cakeflow.journal.audit import verify
from cakeflow.journal.ledger import bodies
from cakeflow.journal.schema import BatchBody
from cakeflow.models.shards import whole

SHARDED, SPLIT = (2, 1), (1, 2)  # ranks by (data_parallel_size, tensor_parallel_size)
RECIPES = {
    "memit": {},
    "alphaedit": {"rounds": 1, "repairs": 1},
    "cake": {"weighter": Scores(score_source="per_request")},
    "memit_seq": {"moments": None, "statistics": {"source": "corpus.txt", "tokens": 256, "window": 32}},
    "rome": {"chat": False},
}
"""Recipe -> what it is run with: further walks, traces of the facts, second moments that are collected."""


def over(sizes):
    """Trainer arguments of a model that is sharded over ranks."""
    return {**QUIET, "devices": sizes[0] * sizes[1], "strategy": ModelParallelStrategy(*sizes)} if sizes else QUIET


def numbers(lm):
    return {name: whole(each.detach()).numpy().copy() for name, each in lm.model.state_dict().items()}


@pytest.mark.parametrize(("arch", "methods"), [("gpt2", [*RECIPES]), ("llama", ["cake"])])
def test_fsdp2_leads_to_the_bits_of_a_whole_model(arch, methods, _models, requests, tmp_path):  # noqa: PT019
    lm, words = _models[arch], " ".join(request.text for request in requests)
    (tmp_path / "corpus.txt").write_text("\n".join([words] * 8))

    def work(sizes):
        os.chdir(tmp_path)
        runs = {}
        for method, parts in ((method, RECIPES[method]) for method in methods):
            os.environ["CAKEFLOW_CACHE"] = str(tmp_path / "cache" / str(sizes))  # so that each measures by itself
            editor, size = edits(copy.deepcopy(lm), method, 1, over(sizes), **parts), 1 if method == "rome" else 4
            if method == "memit":
                editor._trainer["callbacks"] = [OutcomeCheck(familiar=2), NeutralText(every=None)]
            before, folder = weights(editor.module.lm), tmp_path / f"{method}-{len(sizes)}"
            result = editor.fit(requests[: 3 if method == "rome" else 7], size, run_dir=folder)
            asked = editor.evaluate(requests[:11], 4).metrics, editor.ask(["Ann plays", "I live in"])
            runs[method] = outcome(editor, result), str(asked), editor.module.lm.sharded
            editor.rollback(1)
            editor.rollback()
            assert weights(editor.module.lm) == before
        return runs

    expected = work(())
    for each in results(2, lambda _: work(SHARDED), tmp_path):
        assert {method: run[:2] for method, run in each.items()} == {m: run[:2] for m, run in expected.items()}
        assert all(sharded for _, _, sharded in each.values())
    assert not any(sharded for _, _, sharded in expected.values())
    for method in methods:
        texts = [(tmp_path / f"{method}-{ranks}" / "after.jsonl").read_text() for ranks in (0, 2)]
        assert texts[0] == texts[1]
        assert verify(tmp_path / f"{method}-2").faults == []


def test_tensor_parallelism_leads_to_the_weights_of_a_whole_model_but_for_rounding(_models, requests, tmp_path):  # noqa: PT019
    lm = _models["llama"]

    def work(sizes, name):
        runs = {}
        for method in ("memit", "alphaedit"):
            editor = edits(copy.deepcopy(lm), method, 1, over(sizes), **RECIPES[method])
            before = weights(editor.module.lm)
            result = editor.fit(requests[:5], 3, run_dir=tmp_path / f"{method}-{name}")
            asked = editor.evaluate(requests[:11], 4).metrics
            runs[method] = numbers(editor.module.lm), weights(editor.module.lm), {**result.after, **asked}
            editor.rollback()
            assert weights(editor.module.lm) == before
            assert editor.module.lm.sharded == bool(sizes)
        return runs

    expected = work((), "whole")
    for sizes in (SPLIT, (2, 2)):
        first, *others = results(sizes[0] * sizes[1], lambda _, sizes=sizes: work(sizes, f"{sizes}"), tmp_path)
        again = results(2, lambda _: work(SPLIT, "again"), tmp_path) if sizes == SPLIT else []
        for method, (whole_numbers, _, measured) in expected.items():
            split_numbers, hashes, metrics = first[method]
            assert all(each[method][1] == hashes for each in [*others, *again])
            for name, each in whole_numbers.items():
                np.testing.assert_allclose(split_numbers[name], each, rtol=0, atol=1e-12)
            assert metrics == pytest.approx(measured, abs=1e-9)
            folder = tmp_path / f"{method}-{sizes}"
            assert verify(folder).faults == []
            assert f"tensor parallel {sizes[1]}" in ledger(folder)[1].body.arithmetic.products


def test_exact_allocations_are_refused_where_sums_are_not_differentiated_twice(_models, requests, tmp_path):  # noqa: PT019
    def work(_):
        edits(copy.deepcopy(_models["llama"]), "cake", 1, over(SPLIT)).fit(requests[:2], run_dir=tmp_path / "run")

    for error in errors(2, work, tmp_path):
        assert isinstance(error, ArchitectureError)
        assert "shard it by data_parallel_size alone or allocate by Sequential" in str(error)


@pytest.mark.parametrize(("arch", "sizes"), [("gpt2", SHARDED), ("llama", SPLIT)])
def test_a_sharded_model_is_exported_whole(arch, sizes, _models, requests, tmp_path):  # noqa: PT019
    lm, forms = _models[arch], ("model", "delta", "lora")
    lm.model.name_or_path = "model"

    def work(sizes, name):
        editor = edits(copy.deepcopy(lm), "memit", 1, over(sizes))
        editor.fit(requests[:5], 3, run_dir=tmp_path / f"run-{name}")
        for form in forms:
            editor.export(tmp_path / f"{form}-{name}", form)
        return editor.module.lm.sharded

    assert not work((), "whole")
    assert results(2, lambda _: work(sizes, "ranks"), tmp_path) == [True, True]
    for form in forms:
        names = {path.name for path in (tmp_path / f"{form}-whole").glob("*.safetensors")}
        assert names
        for name in names:
            one, other = (tmp_path / f"{form}-{ranks}" / name for ranks in ("whole", "ranks"))
            assert sizes == SPLIT or one.read_bytes() == other.read_bytes()
            for key, each in load_file(one).items() if form == "model" else ():  # factors are one of many pairs
                assert torch.allclose(each.double(), load_file(other)[key].double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("place", [3, 9])
def test_a_rank_that_dies_ends_the_run_and_another_process_goes_on(place, lm, requests, tmp_path):
    def work(sizes, name, victim=-1):
        def run(rank):
            editor = editor_of(copy.deepcopy(lm), over(sizes), contexts=CONTEXTS)
            with STOPS.at(place if rank == victim else -1, signal.SIGKILL):
                editor.fit(requests[:6], 2, evaluate=False, run_dir=tmp_path / name)
            return weights(editor.module.lm)

        return run

    expected = work((), "whole")(0)
    for name, sizes in (("alone", ()), ("again", SHARDED)):
        result = errors(2, work(SHARDED, name, victim=1), tmp_path)
        assert [type(each) for each in result] == [RanksError], result
        assert results(max(1, len(sizes)), work(sizes, name), tmp_path) == [expected] * max(1, len(sizes))
        assert verify(tmp_path / name).faults == []


def test_the_command_shards_a_model(workplace):
    (workplace / "facts.json").write_text('[{"prompt": "{} is", "subject": "Ann", "target_new": "here"}]')
    (workplace / "corpus.txt").write_text("In the town of Lyon people speak. " * 200)
    sizes = ["data_parallel_size=2", "tensor_parallel_size=1"]
    strategy = ["--trainer.strategy", "ModelParallelStrategy", *(f"--trainer.strategy.{size}" for size in sizes)]

    def work(name, *options):
        os.environ["CAKEFLOW_CACHE"] = str(workplace / f"cache-{name}")
        run_command(["fit", "--method", "memit", "--model", "model", "--model.layers", "[1]", "--data", "facts.json",
                     "--model.statistics.tokens", "256", "--model.statistics.source", "corpus.txt", "--run_dir", name,
                     "--trainer.accelerator", "cpu", "--model.targets.steps", "2", *options])  # fmt: skip
        return [change.after for each in bodies(ledger(workplace / name), BatchBody) for change in each.changes]

    (alone,) = in_ranks(1, lambda _: work("whole"), workplace)  # a command changes its process
    assert alone.result
    assert results(2, lambda _: work("sharded", *strategy, "--trainer.devices", "2"), workplace) == [alone.result] * 2


def test_ranks_that_do_not_come_are_named(lm, requests, tmp_path, monkeypatch):
    monkeypatch.setattr("cakeflow.core.strategy.RENDEZVOUS", timedelta(seconds=2))

    def work(_):
        os.environ["WORLD_SIZE"] = "2"  # the other one never starts
        editor_of(copy.deepcopy(lm), over(SHARDED)).fit(requests[:2], run_dir=tmp_path / "run")

    (error,) = errors(1, work, tmp_path)
    assert isinstance(error, RanksError)
    assert "2 ranks were to meet at 127.0.0.1:" in str(error)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_sharded_is_refused(lm, quiet, tmp_path):
    trainer = L.Trainer(**quiet, devices=2, strategy=RankStrategy(3, 1))
    with pytest.raises(ConfigError, match="data_parallel_size=3 times tensor_parallel_size=1 is not the number of"):
        check_ranks(module_of(lm), trainer)
    trainer = L.Trainer(**quiet, devices=2, strategy=RankStrategy(2, 1))
    with pytest.raises(ConfigError, match="Descent descends on a whole weight, and the model is sharded"):
        check_ranks(Editor.from_pretrained(lm.model, "ft", tokenizer=lm.tokenizer, layers=[1]).module, trainer)
    module = module_of(lm)
    check_ranks(module, trainer)
    assert module.tile is None
