"""A repetition searches and solves anew: the same bits, or what differs, batch by batch and by how much."""

import copy
import json
import math
import shutil
import warnings

import lightning as L
import pytest
import torch
from bodies import forge, raw
from tiny_runs import LAYERS, StopAfter, content, editor_of, module_of, name_of
from tiny_vision import random_images, random_vision_model

from cakeflow import Editor, LeastSquares
from cakeflow.core.recorded import RecordedRun
from cakeflow.core.reproduction import RESULT, NumberResult, Reproduction, compare, computed_as, reproduce
from cakeflow.data import builtin_facts
from cakeflow.data.images import ImageEditRequest
from cakeflow.errors import ConfigError, ResumeError
from cakeflow.journal.schema import Arithmetic
from cakeflow.journal.store import JournalStore
from cakeflow.storage.typed import parse_as


@pytest.fixture(scope="module")
def finished(_models, tmp_path_factory, requests):
    """A finished run of three batches in float64."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    editor_of(copy.deepcopy(_models["gpt2"])).fit(requests[:6], 2, run_dir=folder)
    return folder


@pytest.fixture(scope="module")
def repeated(finished, _models, tmp_path_factory):
    """Its repetition."""
    folder = tmp_path_factory.mktemp("repeated") / "again"
    editor_of(copy.deepcopy(_models["gpt2"])).reproduce(finished, run_dir=folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy to spoil."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def spoil(run, kind, number, change):
    """Change one body of a ledger and give it sound hashes."""
    path = run / "journal/ledger.jsonl"
    entries = raw(path)
    change([content for name, content in entries if name == kind][number])
    forge(path, entries)


def compared(run, repeated):
    return compare(RecordedRun.read(run), RecordedRun.read(repeated), repeated)


def test_the_same_bits_come_out_and_the_run_stays_as_it_is(lm, finished, tmp_path):
    before = content(finished)
    result = editor_of(lm).reproduce(finished, run_dir=tmp_path / "again")
    assert result.equal
    assert result.same_weights
    assert result.environment == result.settings == result.metrics == result.apart == []
    assert [batch.batch for batch in result.batches] == [0, 1, 2]
    for batch in result.batches:
        assert {place.place for place in batch.places} == {name_of(lm, layer) for layer in LAYERS}
        assert all(place.recorded == place.repeated and place.update == 0 for place in batch.places)
    assert content(finished) == before
    text = (tmp_path / "again" / RESULT).read_text()
    assert parse_as(Reproduction, text, "", ConfigError, "") == result
    assert "learned" in result.notes[0]  # measured by a callback of the run


def test_a_search_really_takes_place(lm, run, tmp_path):
    """Unlike a replay: the ledger alone will do, whose tensors are elsewhere."""
    for path in (run / "journal").glob("*.safetensors"):
        path.unlink()
    assert editor_of(lm).reproduce(run, run_dir=tmp_path / "again").equal
    spoil(run, "batch", 0, lambda body: body["changes"][0].update(after="0" * 64))
    place = compared(run, tmp_path / "again").apart[0].places[0]
    assert place.recorded == "0" * 64
    assert math.isnan(place.update)
    assert math.isnan(place.weight)


def test_another_setting_is_named_and_sizes_are_those_of_the_weights(lm, finished, tmp_path):
    names = [name_of(lm, layer) for layer in LAYERS]
    original = {name: lm.weight(name).detach().clone() for name in names}
    recorded = copy.deepcopy(lm)
    editor_of(recorded).load(finished)
    result = editor_of(lm, solver=LeastSquares(0.5)).reproduce(finished, run_dir=tmp_path / "again")
    assert not result.equal
    assert not result.same_weights
    assert len(result.apart) == 3
    (setting,) = result.settings
    assert setting.startswith("solver was NullSpace")
    last = {place.place: place for place in result.batches[2].places}
    for name in names:
        apart = (lm.weight(name).detach() - recorded.weight(name).detach()).norm() / original[name].norm()
        assert last[name].weight == pytest.approx(float(apart), rel=1e-9)
    numbers = result.batches[0].numbers
    assert numbers
    assert [row.relative for row in numbers] == sorted((row.relative for row in numbers), reverse=True)
    one, other = (_update(folder, names[0]) for folder in (finished, tmp_path / "again"))
    first = {place.place: place for place in result.batches[0].places}[names[0]]
    assert first.update == pytest.approx(float((other - one).norm() / one.norm()), rel=1e-9)


def _update(folder, place):
    """The dense update of the first batch."""
    store = JournalStore(folder / "journal")
    step = store.read_step(next(entry for entry in store.ledger.entries if entry.kind == "batch"))
    (change,) = [part.change for part in step.changes if part.place == place]
    return change.update.left.T @ change.update.right


def test_a_tampered_number_is_reported_with_its_batch_and_size(run, repeated):
    spoil(run, "batch", 1, lambda body: body["numbers"].update({"target/left": 2 * body["numbers"]["target/left"]}))
    result = compared(run, repeated)
    (batch,) = result.apart
    assert not result.equal
    assert result.same_weights
    assert batch.batch == 1
    (number,) = batch.numbers
    assert number.name == "target/left"
    assert number.recorded == pytest.approx(2 * number.repeated)
    assert number.relative == pytest.approx(0.5)


def test_a_tampered_hash_outcome_and_input_are_reported(run, repeated):
    def change(body):
        body["changes"][0]["after"] = "0" * 64
        body["facts"][0].update(taken=not body["facts"][0]["taken"], reason="")
        body["inputs"]["moment/1"] = "1" * 64

    spoil(run, "batch", 2, change)
    (batch,) = compared(run, repeated).apart
    (place,) = [each for each in batch.places if each.recorded != each.repeated]
    assert place.recorded == "0" * 64
    assert place.update == 0
    assert place.weight == 0
    (fact,) = batch.facts
    assert {fact.recorded.split(" (")[0], fact.repeated.split(" (")[0]} == {"taken", "not taken"}
    assert RecordedRun.read(run).requests[4].subject in fact.prompt
    (fault,) = batch.faults
    assert fault.startswith("inputs.moment/1 was 1111")


def test_metrics_count_beyond_the_last_bits_and_those_of_callbacks_do_not(run, repeated):
    spoil(run, "evaluation", 0, lambda body: body["metrics"].update(efficacy=body["metrics"]["efficacy"] + 1e-9))
    assert compared(run, repeated).equal
    spoil(run, "evaluation", 1, lambda body: body["metrics"].update(efficacy=body["metrics"]["efficacy"] + 0.25))
    result = compared(run, repeated)
    assert not result.equal
    assert result.apart == []
    assert [(each.name, each.recorded - each.repeated) for each in result.metrics] == [("after/efficacy", 0.25)]


def test_the_environment_is_compared(run, repeated):
    def change(body):
        body["versions"]["torch"] = "1.0"
        body["machine"]["processor"] = "abacus"
        body["arithmetic"]["threads"] = 7

    spoil(run, "run", 0, change)
    lines = compared(run, repeated).environment
    assert [line.split(" was ")[0] for line in lines] == ["versions.torch", "machine.processor", "arithmetic.threads"]
    assert "was abacus" in lines[1]


def test_a_batch_that_one_side_lacks_is_named(run, repeated, tmp_path):
    def longer(folder):
        path = folder / "journal/ledger.jsonl"
        entries = raw(path)
        place = next(i for i, (_, each) in enumerate(entries) if each.get("batch") == 2)
        shutil.copy(folder / "journal/batch-00002.safetensors", folder / "journal/batch-00003.safetensors")
        repair = {**entries[place][1], "batch": 3}
        repair["files"] = {"batch-00003.safetensors": repair["files"]["batch-00002.safetensors"]}
        forge(path, [*entries[: place + 1], ("batch", repair), *entries[place + 1 :]])

    longer(run)
    (batch,) = compared(run, repeated).apart
    assert batch.batch == 3
    assert batch.faults == ["the repetition has no such batch"]
    shutil.copytree(repeated, tmp_path / "longer")
    result = compared(run, repeated)
    assert not result.same_weights
    longer(tmp_path / "longer")
    assert compared(repeated, tmp_path / "longer").apart[0].faults == ["the record has no such batch"]


def test_a_run_that_went_on_from_another_is_searched_on_top_of_it(lm, requests, tmp_path):
    editor = editor_of(copy.deepcopy(lm))
    editor.fit(requests[:4], 2, run_dir=tmp_path / "first")
    editor.fit(requests[4:7], 2, run_dir=tmp_path / "next")
    other = editor_of(copy.deepcopy(lm))
    other.load(tmp_path / "next")
    other.rollback(1)
    result = editor_of(lm).reproduce(tmp_path / "next", run_dir=tmp_path / "again")
    assert result.equal
    assert [batch.batch for batch in result.batches] == [2, 3]
    assert "2 batches of an earlier run are applied as recorded" in result.notes[0]
    assert "(3) are repeated all the same" in result.notes[1]


def test_an_earlier_batch_that_was_taken_back_since_then_is_missing(lm, requests, tmp_path):
    editor = editor_of(copy.deepcopy(lm))
    editor.fit(requests[:4], 2, run_dir=tmp_path / "first")
    editor.fit(requests[4:6], 2, run_dir=tmp_path / "next")
    editor.rollback(batch=1)
    with pytest.raises(ResumeError, match="1 of its 2 earlier batches were taken back"):
        editor_of(lm).reproduce(tmp_path / "next", run_dir=tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_another_model_and_an_edited_one_are_refused_before_anything_is_written(lm, finished, tmp_path):
    random_model = copy.deepcopy(lm)
    random_model.weight(name_of(lm, 1)).data[0, 0] += 1
    with pytest.raises(ResumeError, match=r"is not the model of the run.*--model NAME"):
        editor_of(random_model).reproduce(finished, run_dir=tmp_path / "again")
    editor = editor_of(lm)
    editor.load(finished)
    with pytest.raises(ResumeError, match="has 3 edited batches"):
        editor.reproduce(finished, run_dir=tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_folder_inside_the_run_and_none_are_refused(lm, finished, quiet):
    before = content(finished)
    with pytest.raises(ConfigError, match="outside of"):
        editor_of(lm).reproduce(finished, run_dir=finished / "again")
    with pytest.raises(ConfigError, match="got None"):
        reproduce(RecordedRun.read(finished), module_of(lm), L.Trainer(**quiet))
    assert content(finished) == before


def test_an_interrupted_repetition_names_the_command_that_goes_on(lm, finished, tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        editor_of(lm, {"callbacks": [StopAfter(1)]}).reproduce(finished, run_dir=tmp_path / "again")
    path = finished / "journal/ledger.jsonl"
    assert f"go on with: cakeflow reproduce {path} --run_dir {tmp_path / 'again'}" in caplog.text
    assert not (tmp_path / "again" / RESULT).exists()


def test_an_interrupted_repetition_goes_on_in_its_folder(lm, finished, repeated, tmp_path):
    shutil.copytree(repeated, tmp_path / "again")
    path = tmp_path / "again/journal/ledger.jsonl"
    forge(path, raw(path)[:4])
    (tmp_path / "again/journal/batch-00001.safetensors").unlink()
    assert editor_of(lm).reproduce(finished, run_dir=tmp_path / "again").equal


def test_a_run_without_evaluation_is_repeated_without_one(lm, requests, tmp_path):
    editor_of(copy.deepcopy(lm)).fit(requests[:2], run_dir=tmp_path / "run", evaluate=False)
    result = editor_of(lm).reproduce(tmp_path / "run", run_dir=tmp_path / "again")
    assert result.equal
    assert result.notes == []
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "again/journal/ledger.jsonl").read_text().splitlines()]
    assert "evaluation" not in kinds


def test_the_recorded_threads_and_precision_hold_for_the_repetition_only():
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    more = before[0] + 1
    how = Arithmetic(device="cpu", precision="32-true", attention="sdpa", products="high, oneDNN", threads=more)
    with computed_as(how):
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (more, "high")
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before
    with computed_as(how.model_copy(update={"threads": 2**40, "products": "guessed"})):
        assert torch.get_num_threads() <= 512
        assert torch.get_float32_matmul_precision() == before[1]
    with computed_as(None):
        assert torch.get_num_threads() == before[0]
    assert torch.get_num_threads() == before[0]


def test_a_number_that_one_side_lacks_differs_without_bound():
    assert NumberResult(name="x", recorded=float("nan"), repeated=1.0).relative == float("inf")
    assert NumberResult(name="x", recorded=2.0, repeated=1.0).relative == 0.5


def test_images_come_from_the_data_and_their_edits_out_again(tmp_path):
    def editor():
        vm = random_vision_model()
        parts = {"processor": vm.processor, "unrelated": random_images(24, 9)}
        return Editor.from_pretrained(vm.model, "vit_gradient", trainer={"enable_progress_bar": False}, **parts)

    images = [ImageEditRequest(image, label) for label, image in enumerate(random_images(4))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of the labels are right already
        editor().fit(images, 2, run_dir=tmp_path / "run")
        with pytest.raises(ConfigError, match=r"hashes of pictures and no pixels \(image"):
            editor().reproduce(tmp_path / "run", run_dir=tmp_path / "again")
        result = editor().reproduce(tmp_path / "run", images[::-1], run_dir=tmp_path / "again")
    assert result.equal
    assert len(result.batches) == 2


@pytest.mark.real
@pytest.mark.slow
def test_the_real_model_gives_the_same_bits(real_editor, smollm2, tmp_path):
    editor = real_editor("cake", targets={"steps": 3}, trainer={"logger": None})
    editor.fit(builtin_facts()[:2], run_dir=tmp_path / "run", evaluate=False)
    editor.rollback()
    again = real_editor("cake", targets={"steps": 3}, trainer={"logger": None})
    assert again.reproduce(tmp_path / "run", run_dir=tmp_path / "again").equal
    again.rollback()
