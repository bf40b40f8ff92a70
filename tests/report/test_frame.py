"""An edited model in other people's pipelines, and a run's numbers in other people's tables."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from tiny_runs import editor_of
from transformers import pipeline

from cakeflow.report import metrics_frame

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def edited(lm, requests, quiet):
    lm.model.float()
    before = copy.deepcopy(lm.model)
    editor = editor_of(lm, quiet)
    editor.fit(requests[:4], 2, evaluate=False)
    return before, editor


def test_a_pipeline_gives_the_edited_models_words(edited, requests):
    _, editor = edited
    lm = editor.module.lm
    asked = pipeline("text-generation", model=editor.model, tokenizer=editor.tokenizer)
    text = requests[0].text
    (answer,) = asked(text, max_new_tokens=4, do_sample=False, return_full_text=True)
    ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
    for _ in range(4):
        ids = torch.cat([ids, editor.model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert answer["generated_text"] == editor.tokenizer.decode(ids[0])


def test_a_static_cache_gives_the_same_tokens(edited, requests):
    _, editor = edited
    ids = torch.tensor([editor.tokenizer(requests[0].text)["input_ids"]])
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    plain = editor.model.generate(ids, **settings)
    static = editor.model.generate(ids, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(plain, static)


def test_a_compiled_model_has_the_edits(edited, requests):
    before, editor = edited
    ids = torch.tensor([editor.tokenizer(requests[0].text)["input_ids"]])
    compiled = torch.compile(editor.model, backend="eager")
    with torch.no_grad():
        expected, first = editor.model(input_ids=ids).logits, before(input_ids=ids).logits
        torch.testing.assert_close(compiled(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
        assert (expected - first).abs().max() > 1e-3
        editor.rollback()
        torch.testing.assert_close(compiled(input_ids=ids).logits, first, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_lm_eval_scores_the_edited_model(edited, requests, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    before, editor = edited
    rows = [{"question": requests[0].text, "choices": ["red", requests[0].target_new]}]
    datasets.Dataset.from_list(rows).to_json(tmp_path / "rows.json")
    config = {
        "task": "facts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 1,
    }
    scores = []
    for model in (editor.model, before):
        wrapped = HFLM(pretrained=model, tokenizer=editor.tokenizer, batch_size=1)
        result = lm_eval.simple_evaluate(wrapped, tasks=[ConfigurableTask(config=config)], bootstrap_iters=0)
        scores.append([float(each[0][0]) for each in result["samples"]["facts"][0]["resps"]])
    ids = editor.tokenizer(requests[0].text)["input_ids"]
    target = editor.tokenizer(f" {requests[0].target_new}")["input_ids"]
    with torch.no_grad():
        logs = editor.model(input_ids=torch.tensor([ids + target])).logits[0].log_softmax(-1)
    total = sum(float(logs[len(ids) - 1 + i, token]) for i, token in enumerate(target))
    assert scores[0][1] == pytest.approx(total, abs=1e-3)
    assert scores[0] != scores[1]


def test_a_runs_metrics_are_one_frame_and_one_data_set(lm, requests, tmp_path):
    lm.model.float()
    result = editor_of(lm).fit(requests[:2], run_dir=tmp_path / "run")
    frame = metrics_frame(tmp_path / "run")
    assert list(frame.columns) == ["run", "stage", "edits", "protocol", "metric", "value"]
    for stage, metrics in (("before", result.before), ("after", result.after)):
        rows = frame[frame.stage == stage]
        assert dict(zip(rows.metric, rows.value, strict=True)) == metrics
        assert set(rows.edits) == {0 if stage == "before" else 2}
    table = datasets.Dataset.from_pandas(frame)
    assert table.num_rows == len(frame) == len(result.before) + len(result.after)
    assert table.column_names == list(frame.columns)
    twice = metrics_frame(tmp_path / "run", tmp_path / "run")
    assert len(twice) == 2 * len(frame)


@pytest.mark.slow
def test_the_example_of_ci_fails_on_a_changed_byte(lm, requests, tmp_path):
    """The command of the last step, with this run's folder and head."""
    example = yaml.safe_load((ROOT / "examples/ci/verify-run.yml").read_text())
    command = example["jobs"]["verify"]["steps"][-1]["run"].replace("cakeflow", f"{sys.executable} -m cakeflow", 1)
    lm.model.float()
    editor = editor_of(lm)
    editor.fit(requests[:2], run_dir=tmp_path / "run")
    environment = {**os.environ, "RUN": str(tmp_path / "run"), "HEAD": editor.journal.store.ledger.head}
    codes = []
    for _ in range(2):
        codes.append(
            subprocess.run(["bash", "-c", command], env=environment, check=False, capture_output=True).returncode
        )
        path = tmp_path / "run/run.json"
        data = bytearray(path.read_bytes())
        data[20] ^= 1
        path.write_bytes(bytes(data))
    assert codes == [0, 2]
