"""What all methods for images share: exports, thumbnails, and the commands that read run folders and models."""

import csv

import pytest
import torch
from PIL import Image
from tiny_vision import random_images, random_vision_model

from cakeflow import Editor
from cakeflow.cli.command_line import run_command
from cakeflow.errors import ConfigError, EditError, ResumeError
from cakeflow.export import apply_delta
from cakeflow.models import VisionModel, load_editable, load_vision_model

QUIET = {"logger": False, "enable_progress_bar": False}


@pytest.fixture
def place(tmp_path):
    """A model's folder, a folder of unrelated images, and a table of four images with wrong labels."""
    vm = random_vision_model("dinov2")
    vm.model.save_pretrained(tmp_path / "model")
    vm.processor.save_pretrained(tmp_path / "model")
    for index, image in enumerate(random_images(20, 9)):
        (tmp_path / "unrelated" / "any").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "unrelated" / "any" / f"{index:02}.png")
    images = random_images(4)
    with torch.no_grad():
        labels = vm.logits(vm.pixels(images)).argmax(1).tolist()
    with (tmp_path / "wrong.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label"])
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(tmp_path / f"{index}.png")
            rows.writerow([f"{index}.png", (label + 1) % 5])
    return tmp_path


def fit(place, run="run", *further):
    words = ["fit", "--method", "vit_gradient", "--model", str(place / "model"), "--data", str(place / "wrong.csv")]
    words += ["--model.unrelated", str(place / "unrelated"), "--run_dir", str(place / run), "--data.batch_size", "2"]
    return run_command([*words, "--trainer.enable_progress_bar", "false", *further])


def same(first, second):
    one, two = first.model.state_dict(), second.model.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def edited(place, method="vit_gradient", **settings):
    editor = Editor.from_pretrained(
        place / "model", method, unrelated=str(place / "unrelated"), trainer=QUIET, **settings
    )
    editor.fit(str(place / "wrong.csv"), evaluate=False)
    return editor


@pytest.mark.parametrize("method", ["vit_gradient", "vit_heads_removed"])
def test_a_saved_model_is_the_edited_one(place, method):
    editor = edited(place, method)
    editor.save_pretrained(place / "out")
    loaded = load_vision_model(place / "out")
    assert same(loaded, editor.module.lm)
    assert loaded.identity() == editor.module.lm.identity()
    card = (place / "out" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert not same(loaded, load_vision_model(place / "model"))


@pytest.mark.parametrize("method", ["vit_gradient", "vit_heads_removed", "vit_alphaedit"])
def test_a_delta_gives_the_edited_model_and_takes_no_other(place, method):
    wider = {"solver": {"threshold": 10.0}, "max_relative_update": 100.0} if method == "vit_alphaedit" else {}
    editor = edited(place, method, **wider)
    editor.export(place / "delta", "delta")
    vm = load_vision_model(place / "model")
    apply_delta(vm, place / "delta")
    assert same(vm, editor.module.lm)
    with pytest.raises(EditError, match="this model has"):
        apply_delta(vm, place / "delta")


def test_an_edit_of_low_rank_is_a_lora_adapter_too(place):
    editor = edited(place)
    folder = editor.export(place / "lora", "lora")
    assert (folder / "adapter_config.json").exists()
    with pytest.raises(EditError, match="language model"):
        editor.export(place / "gguf", "gguf")


def test_an_export_that_answers_otherwise_is_refused(place, monkeypatch):
    editor = edited(place)
    written = type(editor.model).save_pretrained

    def damaged(self, folder, state_dict, **further):
        state_dict = {**state_dict, "classifier.bias": state_dict["classifier.bias"] + 1}
        return written(self, folder, state_dict=state_dict, **further)

    monkeypatch.setattr(type(editor.model), "save_pretrained", damaged)
    with pytest.raises(EditError, match=r"classifier\.bias is another one"):
        editor.save_pretrained(place / "out")
    assert not (place / "out").exists()


def test_the_commands_take_a_run_of_images(place, capsys):
    result = fit(place)
    assert result.after["sr"] > result.before["sr"] == 0
    run = str(place / "run")
    assert run_command(["verify", run]).faults == []
    assert "classifier.weight" in capsys.readouterr().out or run_command(["log", run])
    journal = run_command(["replay", run])
    assert isinstance(journal.model, VisionModel)
    pictures = sorted(path.name for path in (place / "run").glob("image-*.png"))
    assert len(pictures) == 4
    page = run_command(["report", run]).read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "GradientTargets" in page
    assert all(word in page for word in (">sr</th>", "edited image 0 →", "one of the mirror fails"))
    words_of_prompts = ("efficacy", "Free answers", "EditScore", "neighbor", 'href="#moments"', "<dt>Layers</dt>")
    assert not [word for word in words_of_prompts if f"{word}" in page.partition("<script")[0]]
    out = run_command(["export", run, str(place / "out")])
    assert same(load_editable(out), journal.model)
    delta = run_command(["export", run, str(place / "delta"), "--format", "delta"])
    applied = run_command(["apply", str(delta), str(place / "model"), str(place / "applied")])
    assert same(load_editable(applied), journal.model)
    assert len(run_command(["rollback", run, "-n", "1"])) == 1
    assert len(run_command(["rollback", run])) == 0


def test_thumbnails_are_left_out_where_they_may_not_be_kept(place):
    fit(place, "run", "--model.record_images", "false")
    assert not list((place / "run").glob("*.png"))
    page = run_command(["report", str(place / "run")]).read_text()
    assert "data:image/png" not in page
    assert page.count('class="number">') == 4


def test_the_page_has_a_map_of_heads(place):
    words = ["fit", "--method", "vit_heads", "--model", str(place / "model"), "--data", str(place / "wrong.csv")]
    words += ["--model.unrelated", str(place / "unrelated"), "--run_dir", str(place / "heads")]
    run_command([*words, "--trainer.enable_progress_bar", "false"])
    page = run_command(["report", str(place / "heads")]).read_text()
    assert "Scores of attention heads, highest: layer" in page
    assert "HeadTargets + RelativeRidge" in page


def test_the_command_evaluates_a_model_and_a_run(place):
    words = [
        "--method",
        "vit_gradient",
        "--model.unrelated",
        str(place / "unrelated"),
        "--data",
        str(place / "wrong.csv"),
    ]
    before = run_command(["evaluate", "--model", str(place / "model"), *words]).metrics
    after = fit(place).after
    now = run_command(["evaluate", "--run", str(place / "run"), *words, "--run_dir", str(place / "other")]).metrics
    assert before["sr"] == 0
    assert now["sr"] == after["sr"]


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(place):
    fit(place, "whole")
    settings = {"unrelated": str(place / "unrelated"), "trainer": {"enable_progress_bar": False}}
    first = Editor.from_pretrained(place / "model", "vit_gradient", **settings)
    edit = type(first.module).edit

    def stopped(self, batch, step):
        if len(self.journal):
            raise KeyboardInterrupt
        edit(self, batch, step)

    first.module.edit = stopped.__get__(first.module)
    with pytest.raises(KeyboardInterrupt):
        first.fit(str(place / "wrong.csv"), 2, run_dir=place / "part")
    second = Editor.from_pretrained(place / "model", "vit_gradient", **settings)
    second.fit(str(place / "wrong.csv"), 2, run_dir=place / "part")
    whole = run_command(["replay", str(place / "whole")])
    assert same(second.module.lm, whole.model)
    other = Editor.from_pretrained(place / "model", "vit_gradient", **{**settings, "unrelated": random_images(8, 4)})
    with pytest.raises(ResumeError):
        other.fit(str(place / "wrong.csv"), 2, run_dir=place / "part")


def test_a_folder_without_a_classifier_says_so(place):
    vm = random_vision_model("vit")
    vm.model.vit.save_pretrained(place / "bare")
    vm.processor.save_pretrained(place / "bare")
    with pytest.raises(ConfigError, match="lack weights, which would be random"):
        Editor.from_pretrained(place / "bare", "vit_heads", unrelated=random_images(4))
