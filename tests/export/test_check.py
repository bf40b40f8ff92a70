"""An export is loaded and asked again before it counts as written."""

import copy

import pytest
import torch
from tiny_runs import LAYERS, content, editor_of, name_of, state
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cakeflow.errors import ExportError
from cakeflow.export import Manifest, apply_delta, export_applied
from cakeflow.export.manifest import TOLERANCES
from cakeflow.journal.model_state import ModelState
from cakeflow.models.language import LanguageModel

from .conftest import logits

FORMATS = ("model", "delta", "lora")


@pytest.fixture
def editor(lm, requests, quiet):
    lm.model.float()
    editor = editor_of(lm, quiet)
    editor.fit(requests[:4], 2, evaluate=False)
    return editor


@pytest.fixture
def unnoticed(monkeypatch):
    """Changes beside the edits get past the hashes of the model in memory, so that the export's own check sees them."""
    monkeypatch.setattr(ModelState, "check_all", lambda *_args, **_kwargs: None)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_check_leaves_nothing_behind(lm, requests, quiet, tmp_path, format, dtype):
    lm.model.to(dtype)
    editor = editor_of(lm, quiet)
    editor.fit(requests[:4], 2, evaluate=False)
    before, masters = state(lm, editor.module), {name: each.clone() for name, each in lm.masters.items()}
    modules, settings = dict(lm.model.named_modules()), lm.model.generation_config
    editor.export(tmp_path / "out", format)
    assert state(lm, editor.module) == before
    assert dict(lm.model.named_modules()) == modules
    assert lm.model.generation_config is settings
    assert lm.masters.keys() == masters.keys()
    assert all(torch.equal(lm.masters[name], each) for name, each in masters.items())


def test_settings_of_generation_that_contradict_each_other_are_written_as_they_are(lm, editor, ids, tmp_path):
    settings = lm.model.generation_config
    settings.do_sample, settings.temperature, settings.top_p = False, 0.7, 0.6
    editor.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (loaded.generation_config.temperature, loaded.generation_config.do_sample) == (0.7, False)
    assert torch.equal(logits(loaded, ids), logits(lm.model, ids))


def test_weights_that_were_tied_by_hand_come_back(lm, requests, quiet, ids, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=600, hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.layers[3].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    editor = editor_of(LanguageModel.wrap(model, lm.tokenizer), quiet)
    editor.fit(requests[:2], evaluate=False)
    editor.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), ids), logits(model, ids))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.usefixtures("unnoticed")
def test_a_model_that_would_load_as_another_one_is_refused(lm, editor, tmp_path):
    """Loading gives all weights one type, and this weight would lose digits."""
    lm.model.transformer.h[5].ln_2.double()
    name = "transformer.h.5.ln_2.weight"
    with torch.no_grad():
        lm.model.get_parameter(name).add_(1e-12)
    with pytest.raises(ExportError, match=rf"does not give the edited model again: {name} is another one.*delta"):
        editor.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("unnoticed")
def test_a_model_that_does_not_load_is_refused(lm, editor, tmp_path):
    lm.model.transformer.ln_f = torch.nn.Sequential(lm.model.transformer.ln_f)
    with pytest.raises(ExportError, match="does not give the edited model again"):
        editor.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("unnoticed")
@pytest.mark.parametrize("format", ["delta", "lora"])
def test_what_is_added_to_the_base_must_give_all_of_the_model(lm, editor, ids, tmp_path, format):
    assert editor.journal.base.fingerprint  # hashed when a run has a folder
    with torch.no_grad():  # beside the edits
        lm.model.get_parameter(name_of(lm, 2)).add_(0.01)
    before = logits(lm.model, ids)
    with pytest.raises(ExportError, match=r"does not give the edited model again.*beside edits, export the model"):
        editor.export(tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(logits(lm.model, ids), before)
    editor.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), ids), before)


def test_the_manifest_states_the_tolerance_and_the_adapter_keeps_to_it(editor, tmp_path, monkeypatch):
    stated = {format: Manifest.read(editor.export(tmp_path / format, format)).tolerance for format in FORMATS}
    assert stated == {"model": 0, "delta": 0, "lora": 1e-5}
    before = content(tmp_path)
    monkeypatch.setitem(TOLERANCES, "torch.float32", 1e-12)
    with pytest.raises(ExportError, match=r"logits differ by \S+e-\d+ of the largest.*export the delta or the model"):
        editor.export(tmp_path / "lora", "lora", overwrite=True)
    assert content(tmp_path) == before


def test_a_model_that_a_delta_was_applied_to_is_checked_as_well(lm, editor, tmp_path):
    editor.export(tmp_path / "delta", "delta")
    base = copy.deepcopy(lm)
    with torch.no_grad():
        for layer in LAYERS:
            base.weight(name_of(lm, layer)).copy_(editor.journal.original(name_of(lm, layer))[name_of(lm, layer)])
    manifest = apply_delta(base, tmp_path / "delta")
    assert export_applied(base, manifest, tmp_path / "out").is_dir()
    base.model.transformer.ln_f = torch.nn.Sequential(base.model.transformer.ln_f)
    with pytest.raises(ExportError, match="does not give the edited model again"):
        export_applied(base, manifest, tmp_path / "other")
