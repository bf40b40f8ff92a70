"""A finished run is read to be repeated; whatever its repetition lacks is refused before a model is loaded."""

import copy
import hashlib
import json
import re
import shutil

import numpy as np
import pytest
from bodies import body, forge, raw
from tiny_runs import StopAfter, content, editor_of, finished_run

from cakeflow import LeastSquares
from cakeflow.core.config import build_module, find_config, model_kind, shipped
from cakeflow.core.recorded import RecordedRun
from cakeflow.data.images import ImageEditRequest
from cakeflow.errors import ConfigError, LedgerError, ResumeError, RunFolderError
from cakeflow.journal.steps import request_hash


@pytest.fixture(scope="module")
def finished(_models, tmp_path_factory, requests):
    """A finished run of three batches of two facts."""
    folder = tmp_path_factory.mktemp("finished")
    finished_run(copy.deepcopy(_models["llama"]), folder, requests)
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy to spoil."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def spoil(run, change):
    """Change the entries of a ledger, kind and body each, and give it sound hashes."""
    path = run / "journal/ledger.jsonl"
    entries = raw(path)
    result = change(entries)
    forge(path, result if isinstance(result, list) else entries)


def of_kind(entries, kind):
    return [content for name, content in entries if name == kind]


def test_a_folder_and_its_ledger_alone_name_requests_batches_and_measurements(finished, requests, tmp_path):
    before = content(finished)
    record = RecordedRun.read(finished)
    assert record.requests == requests[:6]
    assert [entry.body.batch for entry in record.own] == [0, 1, 2]
    assert set(record.evaluations) == {"before", "after"}
    assert record.has_tensors
    assert record.notes == []
    shutil.copy(finished / "journal/ledger.jsonl", tmp_path / "alone.jsonl")
    alone = RecordedRun.read(tmp_path / "alone.jsonl")
    assert alone.requests == requests[:6]
    assert not alone.has_tensors
    assert "by how much weights differ" in alone.notes[0]
    assert content(finished) == before


def test_batches_that_edit_facts_again_are_no_requests_of_their_own(run, requests):
    def with_repair(entries):
        place = next(i for i, (_, each) in enumerate(entries) if each.get("batch") == 2)
        repair = {**entries[place][1], "batch": 3}
        for name in ("hashes", "requests"):
            repair[name] = [of_kind(entries, "batch")[1][name][1], of_kind(entries, "batch")[0][name][0]]
        return [*entries[:place], ("batch", repair), *entries[place:]]

    spoil(run, with_repair)
    record = RecordedRun.read(run)
    assert record.requests == requests[:6]
    assert len(record.batches) == 4


def test_what_was_done_after_the_run_is_named_and_left_out(run):
    def later(entries):
        undone = of_kind(entries, "batch")[1]["hashes"][:1]
        batch = body("batch", batch=3, undone=undone, undoes=1).to_dict()
        return [*entries, ("rollback", body("rollback", batches=[2]).to_dict()), ("batch", batch),
                ("policy", body("policy").to_dict())]  # fmt: skip

    spoil(run, later)
    record = RecordedRun.read(run)
    assert len(record.batches) == 3
    assert [note.split(" ")[0] for note in record.notes] == ["batches", "1", "the"]
    assert "(2) are repeated" in record.notes[0]
    assert "facts undone" in record.notes[1]
    assert "policy" in record.notes[2]


def test_what_is_no_run_is_refused(tmp_path, run):
    for path in (tmp_path, tmp_path / "missing", run / "run.json"):
        with pytest.raises(RunFolderError, match=r"ledger\.jsonl"):
            RecordedRun.read(path)
    spoil(run, lambda entries: entries[:1])
    with pytest.raises(RunFolderError, match="names no run"):
        RecordedRun.read(run)


def test_a_changed_ledger_is_refused(run):
    path = run / "journal/ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"batch_size":2', b'"batch_size":3'))
    with pytest.raises(LedgerError, match="does not have its hash"):
        RecordedRun.read(run)


def test_tensors_that_were_changed_are_refused_and_missing_ones_are_not(run):
    path = run / "journal/batch-00001.safetensors"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(LedgerError, match=r"batch-00001\.safetensors was changed.*the ledger alone"):
        RecordedRun.read(run)
    path.unlink()
    assert not RecordedRun.read(run).has_tensors


def test_a_stopped_run_is_refused(lm, tmp_path, requests):
    with pytest.raises(KeyboardInterrupt):
        editor_of(lm, {"callbacks": [StopAfter(1)]}).fit(requests[:6], 2, run_dir=tmp_path / "stopped")
    with pytest.raises(ResumeError, match=r"stopped after 2 of 6 facts.*go on, with --run_dir"):
        RecordedRun.read(tmp_path / "stopped")


def test_format_1_is_refused(run):
    spoil(run, lambda entries: of_kind(entries, "run")[0].pop("format"))
    with pytest.raises(ResumeError, match=r"format 1.*cakeflow replay"):
        RecordedRun.read(run)


def test_facts_that_are_not_those_of_the_start_are_refused(run):
    spoil(run, lambda entries: entries.pop(3))
    with pytest.raises(RunFolderError, match=r"other facts than the 6.*from a copy"):
        RecordedRun.read(run)


def test_texts_that_are_not_on_record_are_asked_for(run, requests):
    spoil(run, lambda entries: tuple(each.pop("requests") for each in of_kind(entries, "batch")))
    with pytest.raises(ConfigError, match=r"hashes of 6 facts.*record_texts.*--data"):
        RecordedRun.read(run)
    shuffled = [*requests[8:3:-1], *requests[:4]]
    assert RecordedRun.read(run, shuffled).requests == requests[:6]
    with pytest.raises(ConfigError, match=rf"1 facts .* not in the data, by hash: {request_hash(requests[0])[:12]}"):
        RecordedRun.read(run, requests[1:])


def test_texts_that_do_not_have_their_hashes_are_refused(run):
    spoil(run, lambda entries: of_kind(entries, "batch")[1]["requests"][0].update(subject="Somebody Else"))
    with pytest.raises(LedgerError, match="do not have these hashes"):
        RecordedRun.read(run)


def test_pictures_are_asked_for(run):
    images = [ImageEditRequest(np.full((2, 2, 3), shade, np.uint8), "cat") for shade in range(6)]

    def of_pictures(entries):
        hashes = [request_hash(each) for each in images]
        for place, each in enumerate(of_kind(entries, "batch")):
            some = slice(2 * place, 2 * place + 2)
            each.update(hashes=hashes[some], requests=[image.to_dict() for image in images[some]])
        of_kind(entries, "run")[0]["data"] = _data_hash(hashes)

    spoil(run, of_pictures)
    with pytest.raises(ConfigError, match=r"hashes of pictures and no pixels.*--data"):
        RecordedRun.read(run)
    assert RecordedRun.read(run, images).requests == images


def _data_hash(hashes):
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def test_a_kind_of_change_that_no_plugin_here_has_is_refused(run):
    spoil(run, lambda entries: of_kind(entries, "batch")[0]["changes"][0].update(kind="Foreign"))
    with pytest.raises(LedgerError, match=r"'Foreign'.*import the plugin"):
        RecordedRun.read(run)


@pytest.mark.parametrize("name", [name for name in shipped("method") if not name.startswith(("vit", "cake_official_"))])
def test_a_method_on_record_makes_the_same_module(name):
    path = find_config("method", name)
    kind = model_kind(path)
    numbers = [shipped(kind)["smollm2-135m"]] if "smollm2-135m" in shipped(kind) else []
    module = build_module([path, *numbers], base="smollm2-135m")
    again = build_module([json.loads(json.dumps(module.method))], base="smollm2-135m")
    assert type(again) is type(module)
    assert again.settings() == module.settings()
    assert again.method == module.method


def test_no_token_and_no_model_get_into_the_record():
    secret = {"model_kwargs": {"token": "secret"}, "base": "somewhere"}
    module = build_module([find_config("method", "memit")], layers=[1], **secret)
    assert module._loading["token"] == "secret"
    assert not {"secret", "somewhere"} & set(re.findall(r"\w+", str(module.method)))


def test_a_module_of_objects_has_no_method_on_record(lm):
    recipe = find_config("method", "memit")
    assert build_module([recipe], base=lm, layers=[1]).method["init_args"]["layers"] == [1]
    assert build_module([recipe], base=lm, layers=[1], solver=LeastSquares(0.5)).method == {}


def test_a_run_that_goes_on_from_another_needs_its_folder(run, tmp_path):
    def earlier(entries):
        start = entries.pop(1)
        of_kind(entries, "model")[0]["earlier"] = 1
        first = next(i for i, (kind, _) in enumerate(entries) if kind == "batch")
        hashes = [name for each in of_kind(entries, "batch")[1:] for name in each["hashes"]]
        start[1].update(data=_data_hash(hashes), edits=4)
        entries.insert(first + 1, start)

    spoil(run, earlier)
    record = RecordedRun.read(run)
    assert len(record.requests) == 4
    assert "1 batches of an earlier run" in record.notes[0]
    shutil.copy(run / "journal/ledger.jsonl", tmp_path / "alone.jsonl")
    with pytest.raises(ResumeError, match="the whole run folder"):
        RecordedRun.read(tmp_path / "alone.jsonl")
