"""Reading a run folder back, and refusing a broken one by file, line and remedy."""

import json
import os
from pathlib import Path

import pytest
from bodies import body

import cakeflow.report.folder as folder
from cakeflow.errors import RunFolderError
from cakeflow.export.manifest import utc
from cakeflow.journal.ledger import Ledger
from cakeflow.report import RunFolder

from .conftest import write_ledger


def test_everything_is_read(run_folder):
    run = RunFolder.read(run_folder)
    assert (len(run.before), len(run.after), len(run.edits), run.size) == (12, 12, 12, 12)
    assert [edit.batch for edit in run.edits] == [0] * 4 + [1] * 4 + [2] * 4
    assert [edit.targets[0].loss for edit in run.edits] == [0.5 / n for n in range(1, 13)]
    assert run.after[5].target_true is None
    assert run.after[5].prompts[0].success is None
    assert run.after[0].generations[0].prompt == "Person 0 is known for"
    assert run.log[2]["step"] == 1
    assert run.config.startswith("model:")
    assert run.metrics("after") == {"efficacy": 0.875, "margin": 1.5}


def test_targets_at_several_layers_go_to_their_requests(run_folder):
    fact = {"prompt": "{} is", "subject": "Ann", "target_new": "here"}
    targets = [
        {"layer": layer, "loss": loss, "probability": 0.5, "steps": 3}
        for layer, loss in ((3, 1), (3, 2), (7, 3), (7, 4))
    ]
    step = {"requests": [fact, fact | {"subject": "Bob"}], "targets": targets}
    write_ledger(run_folder / "journal" / "ledger.jsonl", [step])
    result = [[(target.layer, target.loss) for target in edit.targets] for edit in RunFolder.read(run_folder).edits]
    assert result == [[(3, 1), (7, 3)], [(3, 2), (7, 4)]]


def test_a_ledger_that_goes_on_from_an_earlier_run_gives_the_own_edits_and_marks_those_taken_back(run_folder):
    path, fact = run_folder / "journal" / "ledger.jsonl", {"prompt": "{} is", "subject": "Ann", "target_new": "here"}
    path.unlink()
    ledger = Ledger(path)
    ledger.append(body("batch", batch=2, requests=[fact | {"subject": "Old"}]))
    ledger.append(body("run"))
    for number, name in enumerate(("Ann", "Bob", "Cid"), 3):
        ledger.append(body("batch", batch=number, requests=[fact | {"subject": name}]))
        ledger.append(body("run"))  # the desk, opened again with other settings
    ledger.append(body("rollback", batches=[4]))
    run = RunFolder.read(run_folder)
    marks = [(edit.subject, edit.batch, edit.rollback and edit.rollback.who) for edit in run.edits]
    assert marks == [("Ann", 3, None), ("Bob", 4, "ann@host"), ("Cid", 5, None)]
    assert [rollback.batches for rollback in run.rollbacks] == [[4]]


def test_a_rollback_outdates_the_measurements_before_it_only(run_folder):
    ledger = Ledger(run_folder / "journal" / "ledger.jsonl")
    for kind, stage, outdated in (
        ("evaluation", "after", False),
        ("rollback", None, True),
        ("evaluation", "before", True),
        ("evaluation", "after", False),
    ):
        ledger.append(body(kind, **({"stage": stage} if stage else {})))
        assert RunFolder.read(run_folder).outdated == outdated


def test_who_and_when(run_folder):
    run, ledger = RunFolder.read(run_folder), Ledger(run_folder / "journal" / "ledger.jsonl")
    assert run.start.who == "ann@host"
    assert run.times == {"Started": utc(ledger.entries[0].time), "Ended": "not ended"}
    end = ledger.append(body("end"))
    assert RunFolder.read(run_folder).times["Ended"] == utc(end.time)
    (run_folder / "journal" / "ledger.jsonl").unlink()
    run = RunFolder.read(run_folder)
    assert run.start is None
    assert run.times == {"Written": run.written.strftime("%Y-%m-%d %H:%M UTC")}


def test_without_texts_there_are_no_edits_to_show(run_folder):
    write_ledger(run_folder / "journal" / "ledger.jsonl", [{"hashes": ["ab"]}])
    assert RunFolder.read(run_folder).edits == []


def test_an_older_run_has_its_metrics_in_the_log(run_folder):
    info = json.loads((run_folder / "run.json").read_text())
    for name in ("metrics", "edits", "protocol", "timings", "peaks"):
        del info[name]
    (run_folder / "run.json").write_text(json.dumps(info))
    (run_folder / "metrics.csv").write_text("before/efficacy,after/efficacy,step\n0.25,,0\n,0.75,1\n")
    for name in ("before.jsonl", "after.jsonl"):
        (run_folder / name).unlink()
    run = RunFolder.read(run_folder)
    assert (run.before, run.after, run.size) == (None, None, 12)
    assert (run.metrics("before"), run.metrics("after")) == ({"efficacy": 0.25}, {"efficacy": 0.75})


def spoil(path, number, change):
    """Change line ``number``, from 1, of a file."""
    lines = path.read_text().split("\n")
    lines[number - 1] = change(lines[number - 1])
    path.write_text("\n".join(lines))


def without(*names):
    return lambda line: json.dumps({key: value for key, value in json.loads(line).items() if key not in names})


def with_value(name, value):
    return lambda line: json.dumps(json.loads(line) | {name: value})


def with_prompt(**values):
    def change(line):
        record = json.loads(line)
        record["prompts"][0] |= values
        return json.dumps(record)

    return change


def deep(levels):
    return {"a": deep(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    ("file", "number", "change", "words"),
    [
        ("run.json", 1, lambda line: line[:-3], ["run.json", "delete the file"]),
        ("run.json", 1, lambda line: "[]", ["run.json", "content = []"]),
        ("run.json", 1, without("settings"), ["run.json, settings: Field required", "run the edit again"]),
        ("run.json", 1, lambda line: json.dumps(json.loads(line) | {"edits": "many"}), ["edits = 'many'", "integer"]),
        (
            "run.json",
            1,
            lambda line: json.dumps(json.loads(line) | {"timings": {"keys": "x"}}),
            ["run.json, timings.keys = 'x'"],
        ),
        ("after.jsonl", 3, lambda line: line[:40], ["after.jsonl, line 3", "run the edit again"]),
        ("before.jsonl", 12, without("subject"), ["before.jsonl, line 12, subject: Field required"]),
        (
            "after.jsonl",
            1,
            lambda line: line.replace('"expected_logprob": -6.0', '"expected_logprob": "a"', 1),
            ["line 1, prompts.", "expected_logprob = 'a'"],
        ),
        (
            "after.jsonl",
            2,
            lambda line: line.replace('"correct": true', '"correct": 1'),
            ["line 2, prompts.0.correct = 1", "boolean"],
        ),
        (
            "after.jsonl",
            2,
            lambda line: line.replace('"text":', '"words":'),
            ["line 2, generations.0.text: Field required"],
        ),
        ("journal/ledger.jsonl", 2, without("kind"), ["ledger.jsonl, entry 1, kind: Field required"]),
        (
            "journal/ledger.jsonl",
            3,
            lambda line: line.replace("Person", "person"),
            ["entry 2", "does not have its hash"],
        ),
        ("metrics.csv", 3, lambda line: "high" + line, ["metrics.csv, line 3", "high"]),
        ("metrics.csv", 3, lambda line: line + ",1,2", ["metrics.csv, line 3"]),
        ("metrics.csv", 3, lambda line: "9" * 200_000 + line, ["metrics.csv: field larger"]),
        (
            "metrics.csv",
            1,
            lambda line: line + ",layer99999/update",
            ["metrics.csv, column 'layer99999/update': no model has such a layer"],
        ),
        ("metrics.csv", 1, lambda line: line + f",layer{'9' * 5000}/a", ["metrics.csv, column", "no model has"]),
        ("run.json", 1, with_value("edits", 10**400), ["run.json, edits = 1", "less than"]),
        ("run.json", 1, with_value("edits", -5), ["run.json, edits = -5", "greater than"]),
        ("run.json", 1, with_value("timings", {"keys": 1e308}), ["run.json: 1e+308 is beyond"]),
        ("run.json", 1, with_value("settings", deep(900)), ["run.json: nested more than 64 levels"]),
        ("after.jsonl", 1, with_value("index", 10**400), ["after.jsonl, line 1, index = 1"]),
        ("after.jsonl", 1, with_prompt(tokens=1.5), ["after.jsonl, line 1, prompts.0.tokens = 1.5", "less than"]),
        ("after.jsonl", 1, with_prompt(expected_logprob=10**400), ["after.jsonl, line 1, prompts.0.expected_logprob"]),
    ],
)
def test_a_broken_file_is_named_with_its_line(run_folder, file, number, change, words):
    spoil(run_folder / file, number, change)
    with pytest.raises(RunFolderError) as error:
        RunFolder.read(run_folder)
    for word in words:
        assert word in str(error.value)


def test_numbers_that_a_logger_wrote_are_bounded(run_folder):
    (run_folder / "metrics.csv").write_text("layer1/update,layer2/update,neutral/edits\ninf,1e308,nan\n-inf,1,2\n")
    first, second = RunFolder.read(run_folder).log
    assert all(value != value for value in first.values())
    assert (second["layer2/update"], second["neutral/edits"]) == (1, 2)


@pytest.mark.parametrize("seconds", [2**33 * 60, 2**62, -(2**62)])
def test_a_time_that_no_calendar_has_is_named(seconds):
    class Dated(type(Path())):
        """A file of a file system whose times go that far."""

        def stat(self, **_):
            return os.stat_result((0,) * 8 + (seconds, 0))

    with pytest.raises(RunFolderError, match=r"run.json, time of writing: .*; touch the file"):
        folder._written(Dated("run.json"))


def test_bytes_that_are_no_text(run_folder):
    (run_folder / "after.jsonl").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(RunFolderError, match=r"after.jsonl.*utf-8"):
        RunFolder.read(run_folder)


def test_a_folder_that_is_no_run_folder_is_told_where_runs_are(run_folder):
    with pytest.raises(RunFolderError, match=r"no run.json; give one of .*run"):
        RunFolder.read(run_folder.parent)
    with pytest.raises(RunFolderError, match="cakeflow fit printed"):
        RunFolder.read(run_folder / "journal")


def test_a_log_probability_that_is_no_number_fails(run_folder):
    path = run_folder / "after.jsonl"
    spoil(path, 1, lambda line: json.dumps(broken(json.loads(line))))
    prompt = RunFolder.read(run_folder).after[0].prompts[0]
    assert (prompt.expected_logprob, prompt.success) == (None, False)


def broken(record):
    record["prompts"][0]["expected_logprob"] = None
    return record


def test_a_run_folder_of_format_1_is_read():
    run = RunFolder.read(Path(__file__).parents[1] / "fixtures/format1/run")
    assert (len(run.before), len(run.after), run.size, run.info.protocol) == (4, 4, 4, "clean-v1")
    assert [edit.subject for edit in run.edits] == [record.subject for record in run.after]
    assert [edit.rollback is not None for edit in run.edits] == [True, True, False, False]  # batch 0 was undone
    assert run.outdated
    assert [(target.layer, target.steps) for target in run.edits[2].targets] == [(1, 3.0)]
    assert run.after[0].prompts[0].expected == "Rome"
    assert run.after[0].prompts[0].expected_logprob > run.before[0].prompts[0].expected_logprob


def test_pictures_of_a_run_are_read_and_what_is_none_is_refused(run_folder):
    (run_folder / "image-0123456789ab.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    assert RunFolder.read(run_folder).thumbnails == {"0123456789ab": "iVBORw0KGgpyZXN0"}
    (run_folder / "image-0123456789ab.png").write_bytes(b"<svg onload=alert(1)>")
    with pytest.raises(RunFolderError, match="no PNG file of at most"):
        RunFolder.read(run_folder)
