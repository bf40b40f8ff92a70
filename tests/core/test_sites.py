"""Any linear map of a block is edited by configuration alone: keys, statistics, journal, exports and memory follow."""

import copy

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cakeflow import Contexts, Editor
from cakeflow.core.config import build_module
from cakeflow.core.statistics import Statistics
from cakeflow.errors import ArchitectureError, ConfigError
from cakeflow.export import apply_delta
from cakeflow.journal.audit import verify
from cakeflow.journal.journal import Journal
from cakeflow.models.architecture import Site
from cakeflow.storage.hashing import tensor_hash

SITES = {
    ("gpt2", "attn_out"): {"site": "attn_out", "targets": {"steps": 8, "lr": 0.5}},
    ("llama", "attn_out"): {"site": "attn_out", "targets": {"steps": 8, "lr": 0.5}},
    ("llama", "mlp.up_proj"): {"site": "mlp.up_proj", "targets": {"steps": 8, "lr": 0.5, "site": "mlp.up_proj"}},
    ("llama", "self_attn.v_proj"): {
        "site": "self_attn.v_proj",
        "targets": {"steps": 8, "lr": 0.5, "site": "self_attn.v_proj"},
    },
    ("gpt2", "mlp.c_fc"): {"site": "mlp.c_fc", "targets": {"steps": 8, "lr": 0.5, "site": "mlp.c_fc"}},
}
"""Architecture and edited projection -> what a config says; one that does not write the residual stream has targets at
its own output."""


@pytest.fixture
def model_of(request):
    """Architecture -> a fresh copy of its tiny model."""
    return lambda arch: copy.deepcopy(request.getfixturevalue("_models")[arch])


def editor_at(lm, tmp_path, config):
    """An editor from a YAML file that names the projection."""
    own = config["targets"].get("site") is not None
    allocator = {"class_path": "Sequential", "init_args": {"power": 0.0, "residual_at": "self"} if own else {}}
    solver = {"class_path": "LeastSquares", "init_args": {"ridge": 1e-6}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"model": {**config, "allocator": allocator, "solver": solver}}))
    width = lm.key_width(Site(0, config["site"]))
    moments = dict.fromkeys([1, 2], 1e-8 * torch.eye(width, dtype=torch.float64))
    values = {"layers": [1, 2], "contexts": Contexts(), "moments": moments, "max_relative_update": 1e9}
    module = build_module([tmp_path / "own.yaml"], base=lm, **values)
    return Editor(module, {"enable_progress_bar": False, "accelerator": "cpu"})


@pytest.mark.parametrize(("arch", "site"), SITES, ids=str)
def test_a_projection_is_edited_by_configuration_alone(model_of, tmp_path, requests, arch, site):
    lm = model_of(arch)
    unedited, before = copy.deepcopy(lm), {n: t.clone() for n, t in lm.model.state_dict().items()}
    editor = editor_at(lm, tmp_path, SITES[arch, site])
    result = editor.fit(requests[:4], 2, run_dir=tmp_path / "run")
    names = [lm.weight_name(Site(layer, site)) for layer in (1, 2)]
    changed = [name for name, tensor in lm.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert sorted(changed) == sorted(names) == sorted(editor.journal.places.originals)
    losses = [target.loss for step in editor.journal for target in step.targets]
    assert torch.tensor(losses).isfinite().all()
    own = "site" in SITES[arch, site]["targets"]  # at the end of the block, its MLP moves as well
    assert result.logged["target/left"] < (1e-3 if own else 0.6) * result.logged["layer2/residual"]
    assert verify(tmp_path / "run").faults == []
    assert editor.journal.history(names[0]).keys.shape == (4, lm.key_width(Site(1, site)))
    editor.export(tmp_path / "delta", "delta")
    editor.export(tmp_path / "lora", "lora")
    adapters = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {name.split(".lora_")[0] for name in adapters} == {
        f"base_model.model.{n.removesuffix('.weight')}" for n in names
    }
    fresh = copy.deepcopy(unedited)
    apply_delta(fresh, tmp_path / "delta")
    repeated = Journal(unedited)
    repeated.load(tmp_path / "run" / "journal")
    for other in (fresh, unedited):
        assert all(tensor_hash(other.weight(name)) == tensor_hash(lm.weight(name)) for name in names)
    editor.rollback()
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())


@pytest.mark.real
def test_an_attention_edit_of_the_real_model_takes(smollm2, requests):
    """Every target becomes likely, and two of three are stated: other tokens of a prompt have similar keys."""
    moments = {14: 1e-7 * torch.eye(smollm2.key_width(Site(14, "attn_out")), dtype=torch.float64)}
    solver = {"class_path": "LeastSquares", "init_args": {"ridge": 1e-6}}
    targets = {"site": "attn_out", "steps": 25, "lr": 0.5, "clamp": 4.0}
    config = {"site": "attn_out", "layers": [14], "solver": solver, "targets": targets, "max_relative_update": 1e9}
    module = build_module([], base=smollm2, **config, moments=moments, contexts=Contexts())
    before = {name: tensor.clone() for name, tensor in smollm2.model.state_dict().items()}
    editor = Editor(module, {"enable_progress_bar": False, "accelerator": "cpu"})
    unedited = [answer.prompts[0].expected_logprob for answer in editor.evaluate(requests[:3]).requests]
    result = editor.fit(requests[:3])
    answers = [answer.prompts[0] for answer in module.answers]
    assert result.logged["target/left"] < 1e-3 * result.logged["layer14/residual"]
    for old, answer in zip(unedited, answers, strict=True):
        assert answer.expected_logprob > max(old + 3, -2.5)
    assert sum(answer.correct for answer in answers) >= 2
    editor.rollback()
    assert all(torch.equal(tensor, before[name]) for name, tensor in smollm2.model.state_dict().items())


def test_statistics_of_any_projection(tiny, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    sites = [Site(1, "attn_out"), Site(2, "attn_out"), Site(1, "mlp_out")]
    collected = Statistics(str(tmp_path / "text.txt"), tokens=1024, window=64).collect(tiny, sites, tmp_path / "stats")
    assert [len(collected[site]) for site in sites] == [tiny.key_width(site) for site in sites]
    again = Statistics(str(tmp_path / "text.txt"), tokens=1024, window=64).collect(tiny, sites[:1], tmp_path / "stats")
    assert torch.equal(again[sites[0]].moment, collected[sites[0]].moment)


def test_what_does_not_fit_is_refused_before_anything_runs(lm):
    with pytest.raises(ArchitectureError, match=r"no module 'transformer\.h\.1\.mlp\.nothing'"):
        build_module([], base=lm, layers=[1], site="mlp.nothing")
    with pytest.raises(ArchitectureError, match=r"no module 'transformer\.h\.1\.attn\.nothing'"):
        build_module([], base=lm, layers=[1], targets={"site": "attn.nothing"})
    with pytest.raises(ConfigError, match="Jacobian follows the outputs of whole blocks"):
        build_module([], base=lm, layers=[1], site="attn_out", allocator={"class_path": "Jacobian"})
