"""What a run measures of its model, and tells those who watch."""

import lightning as L
import pytest
import torch
from tiny_runs import editor_of

from cakeflow import EditDataModule
from cakeflow.callbacks import Policy, PolicyGuard
from cakeflow.core.callback import EditCallback
from cakeflow.core.locate_then_edit import LocateThenEdit
from cakeflow.core.module import EditModule
from cakeflow.errors import NumericalError
from cakeflow.evaluation.evaluation import Questions


def test_stages_outcomes_and_phases(lm, requests, tmp_path):
    editor = editor_of(lm)
    module = editor.module
    run = editor.fit(requests[:3], run_dir=tmp_path / "run")
    assert module.metrics_at.keys() == {"before", "after"}
    assert repr(module.metrics_at["after"]) == repr(run.after)
    assert [row.index for row in module.answers] == [0, 1, 2]
    assert module.evaluated == len(module.journal) == 1
    assert {"evaluation", "targets", "keys", "solve"} <= set(module.timings)
    assert editor.evaluate(requests[3:5]).metrics.keys() == run.after.keys()
    assert (module.stage, [row.subject for row in module.answers]) == ("now", [r.subject for r in requests[3:5]])
    with module.phase("something"):
        pass
    assert module.timings["something"] >= 0


def test_a_run_of_a_plain_trainer_is_judged_by_what_it_measured(lm, requests):
    editor = editor_of(lm, {"logger": False})
    editor.fit(requests[:2])
    editor.evaluate(requests[:2])
    guard = PolicyGuard(Policy(minimum={"edits": 3.0}))
    options = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    L.Trainer(**options, callbacks=[guard]).fit(editor.module, datamodule=EditDataModule(requests[2:3]))
    assert (editor.module.stage, [*editor.module.metrics_at]) == ("after", ["after"])
    assert repr(editor.module.metrics_at["after"]) == repr(editor.evaluate(requests[2:3]).metrics)


def test_a_watcher_that_cannot_measure_does_not_undo_an_edit(lm, requests, tmp_path):
    class Watcher(EditCallback):
        def on_batch_edited(self, module, left):
            raise NumericalError("nothing to see")

    editor = editor_of(lm, {"callbacks": [Watcher()]})
    with pytest.warns(UserWarning, match="Watcher measured nothing here: nothing to see"):
        editor.fit(requests[:2], evaluate=False, run_dir=tmp_path / "run")
    assert len(editor.journal) == 1


def test_what_is_logged_while_a_batch_is_made_is_in_its_account(lm, requests, tmp_path):
    class Watcher(EditCallback):
        def on_layer_solved(self, module, edit):
            module.log(f"seen/{edit.context.site.layer}", 1.5)

    editor = editor_of(lm, {"callbacks": [Watcher()]})
    editor.fit(requests[:2], evaluate=False, run_dir=tmp_path / "run")
    numbers = editor.journal[0].numbers
    assert (numbers["seen/1"], numbers["seen/3"]) == (1.5, 1.5)
    assert {"n_eff", "target/loss", "target/left", "layer1/share", "layer3/update"} <= set(numbers)
    assert "memory/peak" not in numbers


def test_a_model_given_by_name_stays_where_a_run_left_it():
    module = LocateThenEdit("smollm2-135m", layers=[1])
    module.model = torch.nn.Linear(2, 2, device="meta")  # whose tensors cannot be moved
    assert module.cpu() is module
    assert module.model.weight.is_meta


def test_what_belongs_to_the_kind_of_the_model_or_the_way_of_asking_is_overridden_in_one_place():
    names = {name for name in vars(Questions) if not name.startswith("_") and callable(vars(Questions)[name])}
    assert names == {"load", "check", "ask", "warn_of_known", "question"}
    assert issubclass(EditModule, Questions)
    assert not names & set(vars(EditModule))
