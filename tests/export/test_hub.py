"""An export goes to the hub as it was written, or not at all; the hub is substituted by a list of what is sent."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard

from cakeflow.errors import ConfigError, ExportError
from cakeflow.export import push_to_hub


@pytest.fixture
def sent(monkeypatch):
    """What the client was asked to do, and the files of the folder at that time."""
    calls = []

    def upload(api, *, repo_id, folder_path, commit_message):
        files = sorted(each.name for each in Path(folder_path).iterdir())
        calls.append((repo_id, api.token, commit_message, files, (Path(folder_path) / "README.md").read_text()))
        return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo, **options: calls.append((repo, options)))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return calls


@pytest.mark.parametrize("format", ["delta", "lora", "model"])
def test_an_editor_uploads_its_model_in_any_format(one, sent, format):
    editor = one[1]
    address = editor.push_to_hub("owner/name", format, private=True, token="secret")
    assert address == "https://huggingface.co/owner/name/commit/1"
    created, (repo, token, message, files, card) = sent
    assert created == ("owner/name", {"private": True, "exist_ok": True})
    assert (repo, token) == ("owner/name", "secret")
    assert message.startswith("4 facts edited in ")
    assert {"README.md", "manifest.json"} < set(files)
    data = ModelCard(card).data
    assert data.library_name == {"delta": "cakeflow", "lora": "peft", "model": "transformers"}[format]
    results = {each.metric_type: each.metric_value for each in data.eval_results}
    assert 0 <= results["efficacy"] <= 1
    assert all("4 edited facts, protocol" in each.dataset_name for each in data.eval_results)
    assert "secret" not in card


@pytest.mark.parametrize("repo", ["", "a/b/c", "owner/na me", "owner/x..y"])
def test_a_name_that_the_hub_cannot_have_is_refused_first(one, sent, repo):
    with pytest.raises(ConfigError, match="push_to_hub="):
        one[1].push_to_hub(repo)
    assert not sent


def test_an_export_that_was_changed_is_not_uploaded(one, sent, tmp_path):
    folder = one[1].export(tmp_path / "out", "delta")
    path = folder / "delta.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ExportError, match=r"delta\.safetensors is not the file that manifest\.json names"):
        push_to_hub(folder, "owner/name")
    path.unlink()
    with pytest.raises(ExportError, match="is not the file"):
        push_to_hub(folder, "owner/name")
    assert not sent


def test_a_hub_that_cannot_be_reached_is_named_with_the_remedy(one, monkeypatch, tmp_path):
    folder = one[1].export(tmp_path / "out", "delta")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ExportError, match=r"owner/name was not written: .*hf auth login"):
        push_to_hub(folder, "owner/name", token="hf_none")
