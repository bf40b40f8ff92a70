"""Rows of a suite: measured once, whatever interrupts; a suite that changed is refused; faults are results."""

import json
import math
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import Callback
from tiny_runs import content

from cakeflow import Editor
from cakeflow.callbacks import KnowledgeCheck, NeutralText
from cakeflow.core.config import build_callbacks
from cakeflow.core.run import run_fit
from cakeflow.errors import ConfigError, ResumeError
from cakeflow.evaluation.evaluation import Questions
from cakeflow.journal.audit import verify
from cakeflow.models import LanguageModel
from cakeflow.report import RunFolder
from cakeflow.storage.locks import locked
from cakeflow.suites import Rows, arms_of, read_suite
from cakeflow.suites.rows import logged_by_callbacks, settings_of
from cakeflow.suites.suite import Arm

OUT = Path("out")
MEASURED = [
    {"class_path": "KnowledgeCheck", "init_args": {"limit": 2}},
    {"class_path": "NeutralText", "init_args": {"every": None, "tokens": 128, "window": 32}},
    {"class_path": "OutcomeCheck", "init_args": {"familiar": 0, "neighbors": 2, "chat": False}},
]
"""Callbacks, two of which share what they measure of the unedited model."""


def measured(path, **parts):
    """The arms of a suite and their rows."""
    arms = arms_of(read_suite(path, **parts))
    return arms, Rows(OUT).measure(arms)


def test_a_row_is_what_the_run_folder_says(write):
    seen = []
    arms = arms_of(read_suite(write()))
    rows = Rows(OUT, lambda arm, row: seen.append((arm.name, row.arm))).measure(arms)
    assert seen == [(arm.name, arm.name) for arm in arms]
    for arm, row in zip(arms, rows, strict=True):
        run = RunFolder.read(OUT / "runs" / row.arm)
        audit = verify(OUT / "runs" / row.arm)
        assert (audit.faults, audit.head) == ([], row.head)
        assert row.metrics["efficacy"] == run.metrics("after")["efficacy"]
        assert row.before["efficacy"] == run.metrics("before")["efficacy"]
        assert (row.protocol, row.edits, row.fault) == (run.info.protocol, 4, "")
        assert row.fingerprint == run.info.model.fingerprint_before
        assert row.settings == settings_of(arm)
        assert row.seconds >= row.seconds_per_edit * row.edits > 0
        assert row.machine == run.start.machine
    assert len({row.fingerprint for row in rows}) == 1
    assert Rows(OUT).measure(arms) == rows


def test_a_model_is_freed_when_its_arm_ends(write, monkeypatch):
    models, alive, wrap = [], [], LanguageModel.wrap.__func__
    kept = lambda cls, *args: models.append(weakref.ref(lm := wrap(cls, *args))) or lm  # noqa: E731
    monkeypatch.setattr(LanguageModel, "wrap", classmethod(kept))
    arms = arms_of(read_suite(write()))
    rows = Rows(OUT, lambda arm, row: alive.append(sum(each() is not None for each in models)))
    rows.measure(arms)
    assert len(models) >= len(arms)
    assert alive == [0] * len(arms)


def test_numbers_of_callbacks_are_first_and_last_of_the_run(write):
    (arm, *_), (row, *_) = measured(write(), methods=["memit_seq"])
    run = RunFolder.read(OUT / "runs" / arm.name)
    logged = [cells["knowledge/new"] for cells in run.log if "knowledge/new" in cells]
    assert len(logged) >= 2
    assert (row.before["knowledge/new"], row.metrics["knowledge/new"]) == (logged[0], logged[-1])
    assert not {name for name in row.metrics if name.startswith("layer") or name.endswith("/edits")}


class Stop(Callback):
    """Interrupts a run before its second batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            raise KeyboardInterrupt


def counting(monkeypatch, kind, name):
    """Lets a method of a class count its calls for the unedited model; returns the list of them."""
    calls, function = [], getattr(kind, name)

    def counted(self, module, *rest):
        calls.extend([] if len(module.journal) else [name])
        return function(self, module, *rest)

    monkeypatch.setattr(kind, name, counted)
    return calls


def test_a_number_that_a_measurement_leaves_out_is_none_of_an_earlier_one():
    log = [{"k/edits": 0.0, "k/masked": 0.5, "k/new": 0.1}, {"loss": 1.0}, {"k/edits": 4.0, "k/new": 0.9}]
    values = logged_by_callbacks(SimpleNamespace(log=log))
    assert values["k/new"] == [0.1, 0.9]
    assert (values["k/masked"][0], math.isnan(values["k/masked"][1])) == (0.5, True)


def test_the_unedited_model_is_asked_and_measured_once_and_says_what_it_says_alone(write, monkeypatch):
    arms = arms_of(read_suite(write(callbacks=MEASURED)))
    with monkeypatch.context() as patch:
        measures = [counting(patch, each, "measure") for each in (KnowledgeCheck, NeutralText)]
        asked, ask = [], Questions.ask
        patch.setattr(Questions, "ask", lambda own, each: asked.append(len(own.journal)) or ask(own, each))
        rows = Rows(OUT).measure(arms)
    assert [len(calls) for calls in measures] == [1, 1]
    assert asked.count(0) == 1
    editor = Editor(arms[1].module(), {"callbacks": arms[1].callbacks(), "enable_progress_bar": False})
    run_fit(editor.trainer("alone"), editor.module, arms[1].requests)
    for name in ("before.jsonl", "after.jsonl", "answers.jsonl"):
        assert Path("alone", name).read_bytes() == (OUT / "runs" / arms[1].name / name).read_bytes()
    alone = logged_by_callbacks(RunFolder.read("alone"))
    assert {"knowledge/restored", "neutral/perplexity"} <= alone.keys()
    assert {name: values[0] for name, values in alone.items()}.items() <= rows[1].before.items()
    assert {name: values[-1] for name, values in alone.items()}.items() <= rows[1].metrics.items()


def test_callbacks_with_other_arguments_share_nothing(write, monkeypatch):
    calls = counting(monkeypatch, NeutralText, "measure")
    longer = {"class_path": "NeutralText", "init_args": {"every": None, "tokens": 256, "window": 32}}
    arms = arms_of(read_suite(write(callbacks=[*MEASURED, longer])))
    Rows(OUT).measure(arms)
    assert len(calls) == 2


def test_a_callback_that_bears_no_name_is_measured_in_every_arm(write, monkeypatch):
    calls, callbacks = counting(monkeypatch, NeutralText, "measure"), Arm.callbacks

    def nameless(arm):
        parts = callbacks(arm)
        for each in parts:
            each.identity = ""
        return parts

    monkeypatch.setattr(Arm, "callbacks", nameless)
    arms = arms_of(read_suite(write(callbacks=MEASURED)))
    Rows(OUT).measure(arms)
    assert len(calls) == len(arms)


def test_an_interrupted_suite_goes_on_where_it_stopped(write, monkeypatch):
    arms, whole = measured(write())
    shutil.move(OUT, "whole")
    callbacks = Arm.callbacks
    with monkeypatch.context() as patch:
        stop = {arms[1].name}
        patch.setattr(Arm, "callbacks", lambda arm: callbacks(arm) + ([Stop()] if arm.name in stop else []))
        with pytest.raises(KeyboardInterrupt):
            Rows(OUT).measure(arms)
    assert [json.loads(line)["arm"] for line in (OUT / "rows.jsonl").read_text().splitlines()] == [arms[0].name]
    first = content(OUT / "runs" / arms[0].name)
    assert len(list((OUT / "runs" / arms[1].name / "journal").glob("*.safetensors"))) >= 1  # its first batch
    rows = Rows(OUT).measure(arms)
    assert content(OUT / "runs" / arms[0].name) == first
    assert [row.metrics for row in rows] == [row.metrics for row in whole]
    assert [row.seconds == row.seconds for row in rows] == [True, False, True]  # of one a part was timed elsewhere
    assert RunFolder.read(OUT / "runs" / arms[1].name).info.timed < arms[1].size
    weights = [
        [change.after for entry in run.ledger if entry.kind == "batch" for change in entry.body.changes]
        for folder in ("whole", OUT)
        for run in [RunFolder.read(Path(folder) / "runs" / arms[1].name)]
    ]
    assert weights[0] == weights[1]


def test_a_finished_run_without_a_row_is_read_not_repeated(write):
    arms, rows = measured(write())
    before = content(OUT / "runs")
    (OUT / "rows.jsonl").unlink()
    again = Rows(OUT).measure(arms)
    assert content(OUT / "runs") == before
    assert [row.model_dump(exclude={"threads"}) for row in again] == [
        row.model_dump(exclude={"threads"}) for row in rows
    ]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"batch_size": 4}, "batch_size"),
        ({"evaluation": {"protocol": "clean", "answer_tokens": 8}}, "evaluation"),
        ({"callbacks": [{"class_path": "OutcomeCheck"}, {"class_path": "KnowledgeCheck", "init_args": {"limit": 2}}]},
         "callbacks"),
        ({"methods": {"memit_seq": {"history": False}}}, "overrides"),
        ({"data": {"own": {"source": "facts.json", "shuffle_seed": 5}}}, "facts"),
    ],
)  # fmt: skip
def test_a_suite_that_changed_under_its_rows_is_refused(write, changes, name):
    measured(write(), methods=["memit_seq"])
    before = content(OUT)
    with pytest.raises(ResumeError, match=rf"own/4/seed0/memit_seq \({name}\) changed; .*--out"):
        measured(write(**changes), methods=["memit_seq"])
    assert content(OUT) == before


def test_a_recipe_that_changed_is_refused_and_a_further_arm_is_added(write, tmp_path):
    (tmp_path / "mine_method.yaml").write_text("model: {solver: {class_path: LeastSquares}}\n")
    methods = {"memit_seq": {}, "own": {"method": "mine_method.yaml"}}
    _, rows = measured(write(methods=methods))
    further = {**methods, "ultraedit": {}}
    assert measured(write(methods=further))[1][:2] == rows
    (tmp_path / "mine_method.yaml").write_text("model: {solver: {class_path: LeastSquares, init_args: {ridge: 2.0}}}\n")
    with pytest.raises(ResumeError, match=r"own/4/seed0/own \(recipe and numbers\) changed"):
        measured(write(methods=further))


def test_another_model_of_the_same_name_is_refused(write, tmp_path):
    path = write()
    measured(path, methods=["memit_seq"])
    other = tmp_path / "toy" / "model.safetensors"
    data = bytearray(other.read_bytes())
    data[-4] ^= 1
    other.write_bytes(bytes(data))
    with pytest.raises(ResumeError, match=r"the rows are of a model with the hash .*--out"):
        measured(path)


def test_a_method_that_breaks_is_a_result_and_does_not_end_the_suite(write):
    methods = {"memit_seq": {}, "strict": {"method": "memit", "max_relative_update": 1e-9}, "ultraedit": {}}
    _, rows = measured(write(methods=methods))
    assert rows[1].fault.startswith("NumericalError: ")
    assert rows[1].metrics == {}
    assert [bool(row.fault) for row in rows] == [False, True, False]
    assert measured(write(methods=methods))[1] == rows


def test_a_model_that_is_not_there_ends_the_suite(write):
    with pytest.raises(ConfigError, match="model 'nowhere' is neither"):
        measured(write(model="nowhere"))
    assert not (OUT / "rows.jsonl").exists()


@pytest.mark.parametrize("ends", [True, False])
def test_an_arm_that_another_process_measures_is_left_to_it_and_taken_if_it_dies(write, ends):
    arms, rows = measured(write())
    line = (OUT / "rows.jsonl").read_text().splitlines()[1]
    shutil.rmtree(OUT)
    seen, begun, rest = [], threading.Event(), threading.Event()

    def other():
        with locked(OUT / "runs" / arms[1].name):
            begun.set()
            assert rest.wait(60)
            if ends:
                with (OUT / "rows.jsonl").open("a") as file:
                    file.write(line + "\n")

    def notify(arm, row):
        seen.append(arm)
        if len(seen) == len(arms) - 1:
            rest.set()

    thread = threading.Thread(target=other)
    thread.start()
    assert begun.wait(60)
    shared = Rows(OUT, notify).measure(arms)
    thread.join()
    assert seen == [arms[0], arms[2], *([] if ends else [arms[1]])]
    assert (shared[1] == rows[1]) == ends  # its time, of another run, is another
    assert [row.metrics["efficacy"] for row in shared] == [row.metrics["efficacy"] for row in rows]


def test_two_processes_share_the_arms(write):
    arms = arms_of(read_suite(write()))
    command = [sys.executable, "-m", "cakeflow", "benchmark", "--suite", "mine.yaml", "--out", str(OUT)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    texts = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    rows = Rows(OUT).measure(arms)
    assert sorted(row.fault for row in rows) == [""] * len(arms)
    for row in rows:
        assert sum(f" s  {row.arm}: " in text for text in texts) == 1
    assert all("suite.html" in text for text in texts)


@pytest.mark.parametrize("line", ["{", '{"arm": "x"}', "[1]"])
def test_damaged_rows_are_refused_with_their_line(write, line):
    measured(write(), methods=["memit_seq"])
    with (OUT / "rows.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ConfigError, match=r"rows.jsonl, line 2.*delete the line"):
        Rows(OUT)


def test_rows_are_read_by_line_feeds_alone(write):
    _, (row,) = measured(write(), methods=["memit_seq"])
    text = row.model_copy(update={"fault": "a line\u2028and\x85more"}).model_dump_json()
    (OUT / "rows.jsonl").write_text(f"{text}\n\n", encoding="utf-8")
    assert [each.fault for each in Rows(OUT).stored.values()] == ["a line\u2028and\x85more"]
    (OUT / "rows.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match=r"rows.jsonl.* UTF-8"):
        Rows(OUT)


def test_callbacks_of_a_config_are_new_each_time(write):
    arm = arms_of(read_suite(write()))[0]
    assert all(one is not other for one in arm.callbacks() for other in arm.callbacks())
    assert build_callbacks([]) == []
