"""The same edit on one, two and three ranks: equal bits, one journal, and nobody waits for a rank that is gone."""

import copy
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from many_ranks import free_port, in_ranks
from rank_runs import CONTEXTS, QUIET, edits, errors, ledger, outcome, ranks_of, results, weights
from stops import STOPS
from tiny_runs import editor_of, module_of

from cakeflow import EditDataModule, EditModule, GradientSearch, LeastSquares, Scores
from cakeflow.callbacks import NeutralText, OutcomeCheck
from cakeflow.cli.command_line import run_command
from cakeflow.core.strategy import RankStrategy, check_ranks
from cakeflow.errors import ConfigError, NumericalError, RanksError, ResumeError
from cakeflow.journal.audit import verify
from cakeflow.journal.journal import Journal
from cakeflow.journal.ledger import bodies
from cakeflow.journal.schema import BatchBody

CORPUS = {"source": "corpus.txt", "tokens": 256, "window": 32}
RECIPES = {
    "memit": {},
    "alphaedit": {"rounds": 1, "repairs": 1},
    "cake": {"weighter": Scores(score_source="per_request")},
    "memit_seq": {"moments": None, "statistics": CORPUS},
    "rome": {"chat": False},
}
"""Recipe -> what it is run with: further walks, traces of the facts, second moments that are collected."""


def test_recipes_lead_to_equal_bits_on_one_two_and_three_ranks(lm, requests, tmp_path):
    words = " ".join(request.text for request in requests)
    (tmp_path / "corpus.txt").write_text("\n".join([words] * 8))

    def work(count):
        answer = {}
        for method, parts in RECIPES.items():
            os.environ["CAKEFLOW_CACHE"] = str(tmp_path / "cache" / str(count))  # so that each measures by itself
            editor, size = edits(copy.deepcopy(lm), method, count, **parts), 1 if method == "rome" else 4
            if method == "memit":
                editor._trainer["callbacks"] = [OutcomeCheck(familiar=2), NeutralText(every=None)]
            result = editor.fit(requests[: 3 if method == "rome" else 7], size, run_dir=tmp_path / f"{method}-{count}")
            answer[method] = outcome(editor, result)
        return answer

    expected = work(1)
    for count in (2, 3):
        for each in results(count, lambda _, count=count: work(count), tmp_path):
            assert [name for name in RECIPES if each[name] != expected[name]] == []
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folders == sorted([*(f"{name}-{count}" for name in RECIPES for count in (1, 2, 3)), "cache"])
    for name in RECIPES:
        texts = [(tmp_path / f"{name}-{count}" / "after.jsonl").read_text() for count in (1, 2, 3)]
        assert texts[0] == texts[1] == texts[2]
        assert verify(tmp_path / f"{name}-3").faults == []


@dataclass(frozen=True)
class OneFails(LeastSquares):
    """Fails in one process only, at the second batch."""

    def solve(self, problem):
        if os.environ.get("RANK") == "1" and len(problem.history):
            raise NumericalError("rank 1 alone")
        return super().solve(problem)


@dataclass(frozen=True)
class PartFails(GradientSearch):
    """Fails for one fact."""

    def search(self, lm, batch, layer, **options):
        if any(request.subject == "fails" for request in batch.requests):
            raise NumericalError(f"{os.environ['RANK']}: {batch.name([0])}")
        return super().search(lm, batch, layer, **options)


@pytest.mark.parametrize(
    "parts",
    [{"targets": PartFails(steps=2)}, {"targets": GradientSearch(steps=2), "solver": OneFails(0.5)}],
    ids=["in a part", "outside of parts"],
)
def test_an_error_of_one_rank_takes_the_batch_back_on_all(parts, lm, requests, tmp_path):
    failing = [*requests[:6]]
    failing[5] = type(failing[5])("{} is", "fails", "x") if "solver" not in parts else failing[5]

    def work(rank):
        editor = editor_of(copy.deepcopy(lm), ranks_of(2), **{"tile": 1, "contexts": CONTEXTS, **parts})
        try:
            editor.fit(failing, 3, evaluate=False, run_dir=tmp_path / "run")
        except NumericalError as error:
            steps = len(editor.journal), weights(editor.module.lm)
            editor.module.journal.memory.check_all()
            return str(error), steps, [body.batch for body in bodies(ledger(tmp_path / "run"), BatchBody)]

    first, second = results(2, work, tmp_path)
    assert first == second
    message, (count, hashes), committed = first
    assert message.endswith("rank 1 alone") if "solver" in parts else message.startswith("0: request 5")
    assert (count, committed) == (1, [0])
    whole = editor_of(copy.deepcopy(lm), QUIET, **{"tile": 1, "contexts": CONTEXTS, **parts})
    whole.fit(failing[:3], 3, evaluate=False)
    assert weights(whole.module.lm) == hashes


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_records_is_evaluated_rightly(count, lm, requests, tmp_path):
    def work(records, size, batch, devices):
        editor = editor_of(copy.deepcopy(lm), {**ranks_of(devices), "logger": False})
        result = editor.evaluate(records, batch)
        return result.metrics, [each.to_dict() for each in result.requests]

    for records, batch in ((requests[:11], 2), (requests[:1], 16)):
        expected = work(records, 1, batch, 1)
        for each in results(count, lambda _, r=records, b=batch: work(r, count, b, count), tmp_path):
            assert each == expected


def test_fewer_requests_than_ranks(lm, requests, tmp_path):
    def work(count):
        editor = edits(copy.deepcopy(lm), "memit", count)
        return outcome(editor, editor.fit(requests[:2], 1, run_dir=tmp_path / f"run-{count}"))

    assert results(3, lambda _: work(3), tmp_path) == [work(1)] * 3


def test_what_follows_a_run_is_done_on_all_ranks(lm, requests, tmp_path):
    def work(count):
        editor, result = editor_of(copy.deepcopy(lm), ranks_of(count), tile=1, contexts=CONTEXTS), []
        folder = tmp_path / f"run-{count}"
        editor.fit(requests[:4], 2, evaluate=False, run_dir=folder)
        editor.rollback(1)
        result.append(weights(editor.module.lm))
        editor.undo(requests[0].subject)
        result.append((weights(editor.module.lm), len(editor.journal)))
        editor.export(tmp_path / f"export-{count}", "delta")
        kinds = [entry.kind for entry in ledger(folder)]
        return result, kinds, sorted(path.name for path in (tmp_path / f"export-{count}").iterdir())

    assert results(2, lambda _: work(2), tmp_path) == [work(1)] * 2


def test_the_command_evaluates_a_run_on_ranks(lm, requests, workplace):
    editor_of(lm, QUIET).fit(requests[:5], 2, evaluate=False, run_dir="run")

    def work(count):
        options = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--data.eval_batch_size", "2"]
        result = run_command(
            ["evaluate", "--run", "run", "--model", "model", "--trainer.devices", f"{count}", *options]
        )
        return result.metrics, [each.to_dict() for each in result.requests]

    assert results(2, lambda _: work(2), workplace) == [work(1)] * 2


def test_a_trainer_of_ones_own_runs_on_ranks(lm, requests, tmp_path, quiet):
    def work(rank):
        trainer = L.Trainer(**{**quiet, "logger": CSVLogger("logs", "run")}, devices=2, strategy="cakeflow")
        module = module_of(copy.deepcopy(lm), tile=1)
        trainer.fit(module, datamodule=EditDataModule(requests[:3], 2))
        return trainer.log_dir, len(module.journal), weights(module.lm), float(trainer.callback_metrics["target/taken"])

    first, second = results(2, work, tmp_path)
    assert first == second
    assert first[1] == 2
    assert [path.name for path in tmp_path.glob("logs/run/*")] == ["version_0"]


def test_what_cannot_run_on_ranks_is_refused(lm, quiet, monkeypatch):
    trainer, module = L.Trainer(**quiet, devices=2, strategy="cakeflow"), module_of(lm)
    assert isinstance(trainer.strategy, RankStrategy)
    check_ranks(module, trainer)
    assert module.settings()["tile"] == module.tile == 8
    with pytest.raises(ConfigError, match="LocateThenEdit edits in one process only: set devices=1"):
        EditModule.use_ranks(module, lockstep=False)
    monkeypatch.setattr(type(lm), "dispatched", True)
    with pytest.raises(ConfigError, match="spread over devices by device_map, and the Trainer has 2 ranks"):
        check_ranks(module, trainer)


def different(name, lm, requests, folder):
    """Makes the work of a rank that differs from the others in one thing."""

    def work(rank):
        model, parts, data = copy.deepcopy(lm), {"tile": 2}, requests[:3]
        if rank and name == "model":
            with torch.no_grad():
                next(model.model.parameters())[0, 0] += 1
        if rank and name == "settings":
            parts["min_arrival"] = 0.25
        if rank and name == "data":
            data = requests[1:4]
        if name == "cache":
            os.environ["CAKEFLOW_CACHE"] = str(folder / f"cache-{rank}")
        run = folder / (f"node-{rank}/run" if name == "folder" else "run")
        if name == "folder":  # a folder of one name on different disks
            run.parent.mkdir(parents=True)
            os.chdir(run.parent)
            run = Path("runs/run")
        editor = editor_of(model, ranks_of(2), **parts)
        try:
            editor.fit(data, 1, evaluate=False, run_dir=run)
        finally:
            assert len(editor.journal) == 0
            assert not (run / "journal" / "ledger.jsonl").exists()

    return work


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model", "ranks differ in model, data or settings: weights is"),
        ("settings", "settings.min_arrival is 0.5 on rank 0 and 0.25 on rank 1"),
        ("data", "ranks differ in model, data or settings: data is"),
        ("cache", "cache-0 of rank 0 is not that of rank 1"),
        ("folder", "place of the run folder runs of rank 0 is not that of rank 1"),
    ],
)
def test_ranks_that_differ_learn_it_before_anything_is_written(name, words, lm, requests, tmp_path):
    result = errors(2, different(name, lm, requests, tmp_path), tmp_path)
    assert [type(each) for each in result] == [RanksError] * 2
    assert all(words in str(each) for each in result), result


# ---- ranks that die ----

FACTS, SIZE = 6, 2  # requests of the runs that are killed, and of a batch


def killed_run(lm, requests, folder, victim, place, count=2):
    """Run on several ranks, of which one is killed at a moment; returns what the others raised."""

    def work(rank):
        editor = editor_of(copy.deepcopy(lm), ranks_of(count), tile=1, contexts=CONTEXTS)
        with STOPS.at(place if rank == victim else -1, signal.SIGKILL):
            editor.fit(requests[:FACTS], SIZE, evaluate=False, run_dir=folder)

    ended = in_ranks(count, work, folder.parent)
    assert ended[victim].status == -signal.SIGKILL
    assert all(each.status == 1 for rank, each in enumerate(ended) if rank != victim)
    return [each.result for rank, each in enumerate(ended) if rank != victim]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("place", [2, 9, 16])
def test_sigterm_to_one_rank_ends_all(place, victim, lm, requests, tmp_path):
    """At whatever moment; a signal while something is stored is heard behind it."""

    def work(rank):
        editor = editor_of(copy.deepcopy(lm), ranks_of(2), tile=1, contexts=CONTEXTS)
        with STOPS.at(place if rank == victim else -1, signal.SIGTERM):
            editor.fit(requests[:FACTS], SIZE, evaluate=False, run_dir=tmp_path / "run")

    for each in errors(2, work, tmp_path):
        assert isinstance(each, RanksError) or (isinstance(each, SystemExit) and each.code == 143), each
    assert verify(tmp_path / "run").faults == []
    assert go_on(lm, requests, tmp_path / "run", 2) == [moments(lm, requests, tmp_path / "whole")[1]] * 2


def moments(lm, requests, folder):
    """The moments of each rank in a run of two that nobody disturbs, and the hashes that it leads to."""

    def work(rank):
        editor = editor_of(copy.deepcopy(lm), ranks_of(2), tile=1, contexts=CONTEXTS)
        with STOPS.at(-1, None):
            editor.fit(requests[:FACTS], SIZE, evaluate=False, run_dir=folder)
        return [" ".join(map(str, each)) for each in STOPS.seen], weights(editor.module.lm)

    (first, hashes), (second, others) = results(2, work, folder.parent)
    assert hashes == others
    return [first, second], hashes


def go_on(lm, requests, folder, count):
    """Go on with a killed run; the hashes of the weights on every rank."""

    def work(rank):
        editor = editor_of(copy.deepcopy(lm), ranks_of(count), tile=1, contexts=CONTEXTS)
        editor.fit(requests[:FACTS], SIZE, evaluate=False, run_dir=folder)
        return weights(editor.module.lm)

    return results(count, work, folder.parent)


def check_killed(lm, requests, folder, victim, place, count, hashes):
    """Kill a rank at a moment, read what is left, and go on with another number of ranks."""
    for error in killed_run(lm, requests, folder, victim, place):
        assert isinstance(error, RanksError)
        assert "lost another one" in str(error)
    if (folder / "journal" / "ledger.jsonl").exists():
        assert [fault for fault in verify(folder).faults if "cut off" not in fault] == []
        if bodies(ledger(folder), BatchBody):
            Journal(copy.deepcopy(lm)).load(folder / "journal")
    assert go_on(lm, requests, folder, count) == [hashes] * count
    assert verify(folder).faults == []


def second(names, word):
    """Place of the first moment of the second batch that is called so."""
    start = next(place for place, name in enumerate(names) if "commit" in name.split()) + 1
    return next(place for place, name in enumerate(names) if place > start and word in name)


def test_a_rank_that_dies_while_a_batch_is_committed_loses_nothing(lm, requests, tmp_path):
    (first, other), hashes = moments(lm, requests, tmp_path / "whole")
    cases = [
        (0, second(first, "changed"), 1),
        (0, second(first, "written batch-00001"), 2),
        (0, second(first, "committed"), 3),
        (1, second(other, "changed"), 3),
        (1, second(other, "remembered"), 1),
    ]
    for number, (victim, place, count) in enumerate(cases):
        check_killed(lm, requests, tmp_path / f"run-{number}", victim, place, count, hashes)


@pytest.mark.slow
def test_every_moment_of_every_rank(lm, requests, tmp_path):
    names, hashes = moments(lm, requests, tmp_path / "whole")
    number = 0
    for victim, seen in enumerate(names):
        last = second(seen, "committed" if victim == 0 else "remembered")
        for place in range(last + 1):
            number += 1
            check_killed(lm, requests, tmp_path / f"run-{number}", victim, place, 1 + number % 3, hashes)


def test_a_run_goes_on_with_the_tile_that_it_had(lm, requests, tmp_path):
    (first, _), hashes = moments(lm, requests, tmp_path / "whole")
    killed_run(lm, requests, tmp_path / "run", 0, second(first, "committed"))
    editor = editor_of(copy.deepcopy(lm), QUIET, contexts=CONTEXTS)
    with pytest.raises(ResumeError, match=r"settings\.tile was 1, is None"):
        editor.fit(requests[:FACTS], SIZE, evaluate=False, run_dir=tmp_path / "run")
    assert go_on(lm, requests, tmp_path / "run", 1) == [hashes]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [[], ["-m", "torch.distributed.run", "--nproc_per_node=2"]], ids=["own", "torchrun"]
)
def test_the_command_starts_ranks(launcher, lm, workplace):
    (workplace / "facts.json").write_text(json.dumps([{"prompt": "{} is", "subject": "Ann", "target_new": "here"}]))
    options = ["--method", "memit", "--model", "model", "--model.layers", "[1]", "--data", "facts.json",
               "--model.statistics.tokens", "256", "--model.statistics.source", "corpus.txt", "--model.tile", "1",
               "--trainer.accelerator", "cpu", "--model.targets.steps", "2"]  # fmt: skip
    (workplace / "corpus.txt").write_text("In the town of Lyon people speak. " * 200)
    for count in (1, 2):
        words = [*(launcher if count == 2 else []), "-m", "cakeflow", "fit", *options, "--run_dir", f"run-{count}"]
        words += ["--trainer.devices", str(count)]
        own = {**os.environ, "MASTER_PORT": str(free_port())}
        ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=240, env=own)
        assert ended.returncode == 0, ended.stderr
    result = [bodies(ledger(workplace / f"run-{count}"), BatchBody)[0] for count in (1, 2)]
    assert [change.after for change in result[0].changes] == [change.after for change in result[1].changes]
    assert not (workplace / "runs").exists()
