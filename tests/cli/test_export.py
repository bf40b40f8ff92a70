"""``cakeflow export`` and ``cakeflow apply``, run in this process."""

import copy

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from tiny_runs import content, editor_of

from cakeflow.cli.export import run_apply, run_export
from cakeflow.errors import ConfigError, ExportError, PolicyError, RunFolderError
from cakeflow.models.loading import Loading, load_model


@pytest.fixture
def one(_models, requests, tmp_path):
    """Folder of the base model, and an editor after a run of two batches in a run folder."""
    lm = copy.deepcopy(_models["gpt2"])
    lm.model.float().save_pretrained(tmp_path / "base")
    lm.tokenizer.save_pretrained(tmp_path / "base")
    editor = editor_of(load_model(tmp_path / "base"))
    editor.fit(requests[:4], 2, run_dir=tmp_path / "run")
    return tmp_path / "base", editor


def test_commands_export_a_run_and_apply_a_delta(one, tmp_path, capsys):
    base, editor = one
    run = editor.journal.store.folder.parent
    before = content(run)
    delta = run_export(run, tmp_path / "delta", "delta")
    model = run_apply(delta, str(base), tmp_path / "model")
    assert f"written to {model}" in capsys.readouterr().out.replace("\n", "")
    assert load_model(model).fingerprint() == editor.module.lm.fingerprint()
    assert "There is no ledger here" in (model / "README.md").read_text()
    whole = run_export(run, tmp_path / "whole", model=str(base))
    weights = [load_file(folder / "model.safetensors") for folder in (model, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert "## Metrics" in (whole / "README.md").read_text()
    assert content(run) == before
    with pytest.raises(ConfigError, match="exists already"):
        run_export(run, whole)
    with pytest.raises(ConfigError, match="exists already"):
        run_apply(delta, str(base), model)
    run_apply(delta, str(base), model, overwrite=True)
    with pytest.raises(ExportError, match="edited already"):
        run_apply(delta, str(model), tmp_path / "twice")
    with pytest.raises(RunFolderError, match=r"has no journal/ledger\.jsonl"):
        run_export(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "nothing").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rules", "exported", "applied"),
    [
        ("max_edits: 4", True, True),
        ("max_edits: 3", False, False),
        ("denied_subjects: [nobody of this name]", True, False),
        ("denied_subjects: [eiffel]", False, False),
        ("minimum: {efficacy: 0}", True, False),
        ("minimum: {efficacy: 1.1}", False, False),
        ("model_names: [nobody]", False, False),
    ],
)
def test_both_pass_a_policy(one, tmp_path, rules, exported, applied):
    """A delta names no facts and has no metrics; the run has both on record."""
    base, editor = one
    run, policy = editor.journal.store.folder.parent, tmp_path / "policy.yaml"
    policy.write_text(rules)
    delta = run_export(run, tmp_path / "delta", "delta")
    for allowed, attempt in (
        (exported, lambda out: run_export(run, out, policy=policy)),
        (applied, lambda out: run_apply(delta, str(base), out, policy=policy)),
    ):
        out = tmp_path / f"out-{attempt.__code__.co_firstlineno}"
        if allowed:
            assert attempt(out).is_dir()
        else:
            with pytest.raises(PolicyError, match="nothing was changed"):
                attempt(out)
            assert not out.exists()


def test_what_comes_behind_the_export_is_checked_before_it(one, tmp_path, monkeypatch):
    run = one[1].journal.store.folder.parent
    with pytest.raises(ConfigError, match=r"push_to_hub='a/b/c'"):
        run_export(run, tmp_path / "out", "delta", push_to_hub="a/b/c")
    with pytest.raises(ConfigError, match=r"none\.pem|cakeflow\[sign\]"):
        run_export(run, tmp_path / "out", "delta", sign=tmp_path / "none.pem")
    assert not (tmp_path / "out").exists()


def test_a_run_is_exported_and_uploaded_with_the_token(one, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo, **options: calls.append((api.token, repo, options)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda *_, **sent: f"https://hub/{sent['repo_id']}")
    run = one[1].journal.store.folder.parent
    run_export(run, tmp_path / "out", "delta", push_to_hub="owner/name", loading=Loading(token="hf_secret"))
    assert calls == [("hf_secret", "owner/name", {"private": True, "exist_ok": True})]
    assert "uploaded: https://hub/owner/name" in capsys.readouterr().out.replace("\n", "")


def test_a_delta_without_the_signature_is_not_applied(one, tmp_path):
    delta = run_export(one[1].journal.store.folder.parent, tmp_path / "delta", "delta")
    with pytest.raises(ExportError, match=r"has no model\.sig"):
        run_apply(delta, str(one[0]), tmp_path / "model", key=tmp_path / "own.pub")
    assert not (tmp_path / "model").exists()
