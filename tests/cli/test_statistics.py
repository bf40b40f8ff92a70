"""``cakeflow statistics``: what fit would collect, by one job or by several."""

import json
import re

import pytest
from second_moments import TEXT

from cakeflow.cli.command_line import run_command as main
from cakeflow.storage.hashing import file_hash


@pytest.fixture
def words(workplace):
    """Options of a pass over 25 windows."""
    (workplace / "corpus.txt").write_text(TEXT)
    (workplace / "small.yaml").write_text(
        "model:\n  init_args:\n    layers: [1, 2]\n    statistics: {window: 20, batch_tokens: 40}\n"
    )
    return ["--model", str(workplace / "model"), "--model_config", "small.yaml", "--source", "corpus.txt",
            "--tokens", "500"]  # fmt: skip


def hashes(folder):
    return {path.name: file_hash(path) for path in folder.glob("layer-*.safetensors")}


def test_three_jobs_merged_are_one_and_fit_collects_nothing(words, workplace, cache, capsys, monkeypatch):
    home = main(["statistics", *words])
    assert home.parent == cache / "statistics"
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"1 .* 192 .* 500", printed)
    one = hashes(home)
    assert [*sorted(one)] == ["layer-1-mlp_out.safetensors", "layer-2-mlp_out.safetensors"]
    monkeypatch.setenv("CAKEFLOW_CACHE", str(workplace / "other"))
    folders = [main(["statistics", *words, "--part", f"{number}/3"]) for number in (1, 2, 3)]
    assert [folder.name for folder in folders] == ["part-1-of-3", "part-2-of-3", "part-3-of-3"]
    assert not list((workplace / "other").rglob("layer-*"))
    merged = main(["statistics", "merge", *map(str, folders[::-1])])
    assert merged == workplace / "other" / "statistics" / home.name
    assert hashes(merged) == one
    monkeypatch.setattr("cakeflow.core.statistics.pass_over", lambda *_: pytest.fail("a second pass"))
    (workplace / "facts.json").write_text(
        json.dumps([{"prompt": "{} is in", "subject": "Lyon", "target_new": "Spain", "target_true": "France"}])
    )
    main(["fit", "--method", "memit", "--config", "small.yaml", "--model", str(workplace / "model"), "--data",
          "facts.json", "--model.statistics.source", "corpus.txt", "--model.statistics.tokens", "500",
          "--model.targets.steps", "1", "--model.contexts.groups", "[['{}']]"])  # fmt: skip


def test_a_folder_of_the_part_can_be_named(words, workplace):
    folder = main(["statistics", *words, "--part", "2/2", "--out", "mine"])
    assert sorted(path.name for path in folder.iterdir()) == ["blocks-6-7.safetensors", "blocks-7-13.safetensors"]


@pytest.mark.parametrize(
    ("further", "reason"),
    [
        (["--part", "4/3"], "part must be a number of so many"),
        (["--out", "mine"], "--out mine is for a --part"),
        (["--source", "nothing.txt"], "nothing.txt"),
        (["--tokens", "20"], "has 20 tokens; at least 192 are needed"),
        (["--method", "wise"], "SideMemory"),
    ],
)
def test_bad_options_end_with_a_message(words, further, reason, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["statistics", *words, *further])
    assert stop.value.code == 2
    assert reason in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("folders", "reason"), [(["nothing"], "nothing has no sums"), ([], "arguments are required: parts")]
)
def test_a_merge_of_nothing_ends_with_a_message(folders, reason, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["statistics", "merge", *folders])
    assert stop.value.code == 2
    assert reason in " ".join(capsys.readouterr().err.split())
