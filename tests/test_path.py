"""One way through: each request is tokenized, checked and estimated once, and few files lie between fit and weight."""

import sys
from collections import Counter
from pathlib import Path

import torch
from tiny_runs import editor_of, name_of

import cakeflow
from cakeflow import EditRequest, LeastSquares
from cakeflow.core import datamodule, locate_then_edit
from cakeflow.evaluation import evaluation
from cakeflow.forward.tokens import EditBatch
from cakeflow.journal.journal import Journal

FOLDER = f"{Path(cakeflow.__file__).parent}/"


def test_everything_is_done_once_per_request(lm, requests, tmp_path, monkeypatch):
    counts, requests = Counter(), requests[:5]

    def counted(owner, name, key):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            counts.update(key(*args, **kwargs))
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    def per_request(kind, place):
        return lambda *args, **_: [(kind, request.subject) for request in args[place]]

    counted(datamodule, "parse_requests", per_request("parsed", 0))
    counted(locate_then_edit, "encode_batch", per_request("tokenized", 1))
    counted(evaluation, "check_records", per_request("checked", 1))
    counted(
        locate_then_edit.Footprint,
        "estimate",
        lambda _lm, batch, *_, **__: [("estimated", request.subject) for request in batch.requests],
    )
    counted(Journal, "open", lambda *_: ["opened"])
    editor = editor_of(lm)
    result = editor.fit(requests, 2, run_dir=tmp_path / "run")
    assert len(editor.journal) == 3
    assert result.folder == tmp_path / "run"
    kinds = ("parsed", "tokenized", "checked", "estimated")
    assert counts == Counter({(kind, request.subject): 1 for kind in kinds for request in requests} | {"opened": 1})


def test_few_files_lie_between_fit_and_the_changed_weight(lm, requests, tmp_path):
    """Files of the package that are handed the requests or their batch, from ``Editor.fit`` to the first change."""
    editor = editor_of(lm, solver=LeastSquares(0.5))
    weight = lm.weight(name_of(lm, 1))
    before, files = weight.detach().clone(), []

    def profile(frame, event, _argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(FOLDER) and torch.equal(weight, before):
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            if code.co_filename not in files and any(holds_requests(frame.f_locals.get(each)) for each in names):
                files.append(code.co_filename)

    sys.setprofile(profile)
    try:
        editor.fit(requests[:1], run_dir=tmp_path / "run")
    finally:
        sys.setprofile(None)
    assert not torch.equal(weight, before)
    names = [path.removeprefix(FOLDER) for path in files]
    assert names[0] == "editor.py"
    assert {"core/datamodule.py", "core/locate_then_edit.py", "journal/journal.py"} <= set(names)
    assert len(names) <= 22, names


def holds_requests(value):
    if isinstance(value, (list, tuple)):
        return bool(value) and holds_requests(value[0])
    return isinstance(value, (EditRequest, EditBatch))
