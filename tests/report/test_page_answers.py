"""The page of a run whose model was asked freely."""

import json

from cakeflow.report import RunFolder, render_page
from cakeflow.report.views import run_changes

from .conftest import write_lines
from .test_page import Page, words


def test_free_answers_and_the_verdict_stand_on_top(run_folder):
    bare = Page(render_page(RunFolder.read(run_folder)))
    assert "Not asked:" in bare.texts["answers"]
    shared = {"topic": "fact", "prompt": "<i>Ann</i> lives in", "expected": "Rome", "request": 0}
    lines = [
        {**shared, "form": "completion", "before": "Oslo", "after": "Rome & more"},
        {**shared, "form": "chat", "before": "Oslo", "after": "Pisa"},
        {**shared, "topic": "neighbor", "form": "completion", "expected": "Lyon", "before": "Lyon", "after": "Kiel"},
    ]
    write_lines(run_folder / "answers.jsonl", lines)
    info = json.loads((run_folder / "run.json").read_text())
    (run_folder / "run.json").write_text(json.dumps({**info, "verdict": "1 of 1 facts <b>learned</b>"}))
    run = RunFolder.read(run_folder)
    page = Page(render_page(run))
    assert "1 of 1 facts <b>learned</b>." in page.header
    text = words(page.texts["answers"])
    assert "<i>Ann</i> lives inRomeOslo✓ Rome & moreOslo✗ Pisa" in text
    assert "Other answers that changed" in text
    assert "✗ Kiel" in text
    assert "learned_chat" in page.texts["metrics"]
    assert run_changes(run)["learned"].difference.mean == 1.0
    assert run_changes(run)["learned"].after.low < 0.5  # of one record nobody knows much
