"""Edits of image classifiers, family by family: they take, are stored, resumed, exported and rolled back."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from cakeflow_vision import (
    ClassifierEdit,
    GradientTargets,
    HeadTargets,
    ImageEvaluation,
    Recall,
    RelativeRidge,
    unrelated_pictures,
)
from tiny_vision import FAMILIES, random_images, random_vision_model

from cakeflow import Editor
from cakeflow.data import ImageEditRequest, ImageProbe, Picture
from cakeflow.errors import ConfigError, NumericalError, RequestError, RequestWarning
from cakeflow.models import read_inputs
from cakeflow.solvers import Descent

QUIET = {"logger": False, "enable_progress_bar": False}
RECIPES = ("vit_heads", "vit_heads_null", "vit_random_heads", "vit_gradient", "vit_ft", "vit_ft_kl")


def mistakes(vm, count=8, seed=0, **values):
    """Requests for images whose label is to be another than the one that the model gives."""
    images = random_images(count, seed)
    with torch.no_grad():
        labels = vm.logits(vm.pixels(images)).argmax(1).tolist()
    return [
        ImageEditRequest(image, (label + 1) % 5, label, case_id=i, **values)
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


def editor_of(vm, method="vit_gradient", **settings):
    return Editor.from_pretrained(
        vm.model, method, processor=vm.processor, trainer=QUIET, **{"unrelated": random_images(24, 9), **settings}
    )


def bits(vm):
    return {name: each.clone() for name, each in vm.model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_of_eight_images_takes_and_rolls_back_bit_for_bit(family):
    vm = random_vision_model(family)
    original, requests = bits(vm), mistakes(vm)
    editor = editor_of(vm, solver={"share": 1e-3}, targets={"steps": 100}, preserve=1e-3, max_relative_update=100)
    result = editor.fit(requests)
    assert (result.before["sr"], result.after["sr"]) == (0.0, 1.0)
    changed = {name for name, each in bits(vm).items() if not torch.equal(each, original[name])}
    assert changed == {f"{path}.weight" for path in vm.classifiers}
    edited = bits(vm)
    with editor.reverted():
        assert same(bits(vm), original)
    assert same(bits(vm), edited)
    editor.rollback()
    assert same(bits(vm), original)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_edits_and_is_taken_back(recipe):
    vm = random_vision_model("dinov2")
    original = bits(vm)
    editor = editor_of(vm, recipe)
    result = editor.fit(mistakes(vm, 4))
    assert not same(bits(vm), original)
    assert 0 <= result.after["sr"] <= 1
    editor.rollback()
    assert same(bits(vm), original)


def test_the_update_is_least_squares_with_the_targets_logits():
    """Reading A of the reference: P = I + R^T K (lambda C + K^T K + mu I)^-1, folded into the classifier as W P."""
    vm = random_vision_model("dinov2")
    weight = vm.weight("classifier.weight").detach().double().clone()
    others, requests = random_images(24, 9), mistakes(vm, 6)
    editor = editor_of(vm, "vit_heads", targets={"top": 2}, preserve=0.5)
    means_of = HeadTargets(2)

    def features(images):
        with torch.no_grad(), read_inputs(vm, ["classifier"]) as inputs:
            vm.logits(vm.pixels(images))
        return inputs["classifier"].double()

    keys, unrelated = features([each.picture.pixels() for each in requests]), features(others)
    editor.module.setup()
    from cakeflow_vision.targets import TargetProblem

    problem = TargetProblem(
        vm.pixels([each.picture.pixels() for each in requests]),
        torch.tensor([each.label for each in requests]),
        {"classifier": keys},
        vm.pixels(others),
    )
    residual = means_of.targets(vm, problem).values["classifier"].double() - keys
    editor.fit(requests)
    moment = unrelated.T @ unrelated / len(unrelated)
    scale = 0.5 * len(unrelated)
    system = scale * moment + keys.T @ keys + 0.01 * scale * moment.diagonal().mean() * torch.eye(len(moment))
    projection = torch.eye(len(moment), dtype=torch.float64) + residual.T @ keys @ torch.linalg.inv(system)
    (change,) = editor.journal.changes
    torch.testing.assert_close(change.update.dense, weight @ projection - weight, rtol=1e-5, atol=1e-7)


def test_a_run_is_stored_resumed_and_loaded_without_pixels(tmp_path):
    def run(vm, folder):
        module = ClassifierEdit(vm, GradientTargets(), unrelated=random_images(24, 9))
        editor = Editor(module, {"enable_progress_bar": False})
        return editor, editor.fit(mistakes(vm, 6), batch_size=2, run_dir=folder)

    vm = random_vision_model()
    editor, result = run(vm, tmp_path / "run")
    edited = bits(vm)
    ledger = (tmp_path / "run" / "journal" / "ledger.jsonl").read_text()
    batches = [json.loads(line)["body"] for line in ledger.splitlines() if json.loads(line)["kind"] == "batch"]
    assert [len(batch["requests"]) for batch in batches] == [2, 2, 2]
    assert set(batches[0]["requests"][0]["image"]) == {"sha256"}
    fresh = random_vision_model()
    other = Editor(ClassifierEdit(fresh, GradientTargets(), unrelated=random_images(24, 9)), QUIET)
    other.load(tmp_path / "run")
    assert same(bits(fresh), edited)
    assert [each.target_new for each in other.journal[0].requests] == [
        each.target_new for each in editor.journal[0].requests
    ]
    other.rollback(batch=1)
    assert not same(bits(fresh), edited)
    other.rollback()
    assert same(bits(fresh), bits(random_vision_model()))
    assert result.folder == tmp_path / "run"


def test_an_evaluation_compares_with_the_unedited_model():
    vm = random_vision_model()
    requests = mistakes(vm, 4)
    probes = [ImageProbe("locality", Picture(image)) for image in random_images(12, 5)]
    requests[0] = ImageEditRequest(requests[0].picture, requests[0].label, group="x", probes=probes)
    editor = editor_of(vm, "vit_ft", solver={"steps": 300, "lr": 0.05})
    assert editor.evaluate(requests).metrics["lr"] == 1.0
    result = editor.fit(requests)
    images = [each.picture.pixels() for each in probes]
    with torch.no_grad():
        after = vm.logits(vm.pixels(images)).argmax(1)
        with editor.reverted():
            before = vm.logits(vm.pixels(images)).argmax(1)
    assert result.after["lr"] == pytest.approx(float((after == before).double().mean()))
    assert result.after["lr"] < 1
    rows = editor.evaluate(requests).requests
    assert [len(row.prompts) for row in rows] == [13, 1, 1, 1]
    assert {answer.kind for answer in rows[0].prompts} == {"rewrite", "locality"}


def test_divergence_keeps_unrelated_labels():
    def kept(divergence):
        vm = random_vision_model(seed=3)
        others = random_images(24, 9)
        with torch.no_grad():
            before = vm.logits(vm.pixels(others)).log_softmax(1)
        editor = editor_of(vm, "vit_ft", solver={"steps": 60, "lr": 0.05}, divergence=divergence)
        editor.fit(mistakes(vm, 4), evaluate=False)
        with torch.no_grad():
            after = vm.logits(vm.pixels(others)).log_softmax(1)
        return float(torch.nn.functional.kl_div(after, before, reduction="batchmean", log_target=True))

    assert kept(10.0) < kept(0.0)


@pytest.mark.parametrize(
    ("label", "message"), [(5, "label = 5: must be a class of the model: 0 to 4"), (-1, "label = -1"), ("cow", "'cow'")]
)
def test_labels_that_the_model_has_not_are_refused_before_it_runs(label, message):
    vm = random_vision_model()
    editor, original = editor_of(vm), bits(vm)
    with pytest.raises(RequestError, match=message):
        editor.fit([ImageEditRequest(random_images(1)[0], label)])
    assert same(bits(vm), original)


def test_names_of_classes_are_labels():
    vm = random_vision_model()
    (request,) = mistakes(vm, 1)
    named = ImageEditRequest(request.picture, vm.labels[request.label])
    assert editor_of(vm).module.encode([named]).labels == (request.label,)


def test_facts_in_words_and_missing_parts_are_refused():
    vm = random_vision_model()
    with pytest.raises(RequestError, match="is a fact in words"):
        editor_of(vm).fit([{"prompt": "{} lives in", "subject": "Ann", "target_new": "Rome"}])
    with pytest.raises(ConfigError, match="no unrelated images"):
        ClassifierEdit(vm)
    with pytest.raises(ConfigError, match="no model is named"):
        ClassifierEdit(unrelated=random_images(2))
    with pytest.raises(ConfigError, match="or, where it classifies images, its image processor"):
        Editor.from_pretrained(vm.model, "vit_heads", unrelated=random_images(2))
    with pytest.raises(ConfigError, match="weights must be 0 or more"):
        ClassifierEdit(vm, unrelated=random_images(2), preserve=-1)
    with pytest.raises(RequestError, match="entry 1, unrelated"):
        unrelated_pictures([random_images(1)[0], np.zeros(3)])


def test_an_image_that_is_edited_and_preserved_is_refused():
    vm = random_vision_model()
    original, requests = bits(vm), mistakes(vm, 3)
    others = [*random_images(4, 9), requests[1].picture.pixels()]
    with pytest.raises(RequestError, match=r"entry 1, image = .* is among the unrelated images, .* leave it out"):
        editor_of(vm, unrelated=others).fit(requests)
    assert same(bits(vm), original)


def test_as_few_unrelated_images_as_one_are_enough():
    vm = random_vision_model()
    result = editor_of(vm, unrelated=random_images(1, 9), max_relative_update=100).fit(mistakes(vm, 2))
    assert result.after["sr"] == 1.0


def test_an_argument_of_the_base_that_is_misspelt_is_named():
    vm = random_vision_model()
    with pytest.raises(ConfigError, match=r"no argument 'recal'; did you mean 'recall'"):
        editor_of(vm, recal=Recall())
    with pytest.raises(ConfigError, match=r"no setting 'record_image'; did you mean 'record_images'"):
        editor_of(vm, record_image=False)


def test_an_update_that_is_too_large_leaves_the_model_as_it_was():
    vm = random_vision_model()
    original, editor = bits(vm), editor_of(vm, max_relative_update=1e-3)
    with pytest.raises(NumericalError, match=r"the update's norm is .*raise max_relative_update"):
        editor.fit(mistakes(vm, 2), evaluate=False)
    assert same(bits(vm), original)
    assert not len(editor.journal)


def test_images_that_are_right_already_are_named():
    vm = random_vision_model()
    right = [ImageEditRequest(each.picture, each.label_true) for each in mistakes(vm, 2)]
    with pytest.warns(RequestWarning, match="right label before any edit: 0, 1"):
        editor_of(vm).fit(right, evaluate=False)


def test_settings_name_unrelated_images_by_hash_and_decide_a_run():
    vm, images = random_vision_model(), random_images(3)
    first, second = (ClassifierEdit(vm, unrelated=each).settings() for each in (images, images[:2]))
    assert first["unrelated"].startswith(Picture(images[0]).hash)
    assert first != second
    assert replace(ImageEvaluation(), sensitive=0.3).id != ImageEvaluation().id
    assert RelativeRidge() != Descent()
