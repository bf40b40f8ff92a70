"""The tables of the terminal."""

import io
from dataclasses import replace

import torch
from bodies import body
from rich.console import Console

from cakeflow import EditRequest, report
from cakeflow.journal.ledger import Entry
from cakeflow.journal.schema import FactBody, FreeAnswer, PolicyBody
from cakeflow.journal.steps import EditStep
from cakeflow.plugins import Plugin
from cakeflow.tracing import PLACES, Trace


def shown(table):
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_metrics_are_percent_with_one_column_per_stage():
    lines = shown(report.metrics_table({"before": {"efficacy": 0.125}, "after": {"efficacy": 1.0}})).splitlines()
    row = next(line for line in lines if "efficacy" in line)
    assert row.index("12.5") < row.index("100.0")


def test_what_is_no_share_is_not_in_percent():
    text = shown(report.metrics_table({"now": {"neutral/perplexity": 30.25, "neutral/kl": 0.125, "neutral/top1": 0.5}}))
    assert [line.split()[-2] for line in text.splitlines() if "neutral" in line] == ["30.25", "0.125", "50.0"]


def test_metrics_that_nothing_could_judge_are_left_out():
    nan = float("nan")
    columns = {"before": {"efficacy": nan, "fluency": nan}, "after": {"efficacy": nan, "fluency": 6.145}}
    text = shown(report.metrics_table(columns, "official-v1"))
    assert "official-v1" in text
    assert "efficacy" not in text
    row = next(line for line in text.splitlines() if "fluency" in line)
    assert "nan" not in row
    assert "614.5" in row


def test_times_are_given_in_all_and_per_edit():
    times, peaks = {"targets": 8.0, "trace": 0.001, "keys": 1.0}, {"targets": 3 * 2**29, "keys": float("nan")}
    words = set(shown(report.phases_table(times, peaks, edits=4)).replace("│", " ").split())
    assert {"targets", "8.0", "2.00", "1.50"} <= words
    assert not {"trace", "nan"} & words


def asked(prompt, form="completion", before="", after="", expected="Rome"):
    return FreeAnswer(topic="fact", form=form, prompt=prompt, expected=expected, before=before, after=after)


def test_markup_in_a_text_is_shown_as_it_is():
    text = shown(report.answers_table([asked("[bold]x[/] is", before="[red]", after="a [/b]")], "Answers"))
    assert "[bold]x[/] is" in text
    assert "a [/b]" in text


def test_answers_stand_in_a_row_per_prompt_and_of_many_the_bad_ones_come_first():
    answers = [asked("Ann lives in", form, "Oslo", after) for form, after in (("completion", "Rome"), ("chat", "Pisa"))]
    text = shown(report.answers_table(answers, "Answers"))
    (row,) = [line for line in text.splitlines() if "Ann" in line]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["Ann lives in", "Rome", "Oslo", "Rome", "Oslo", "Pisa"]
    many = [asked(f"fact {n}", after="Oslo" if n == 7 else "Rome") for n in range(9)]
    text = shown(report.answers_table(many, "Answers", most=2))
    assert "fact 7" in text
    assert "fact 8" not in text
    assert "7 more are in answers.jsonl" in text
    assert "chat" not in text


def trace(places):
    effects = torch.full((4, len(PLACES), 3), torch.nan, dtype=torch.float64)
    effects[:, places] = torch.rand(4, len(places), 3, dtype=torch.float64)
    settings = {"layers": [2, 3, 5], "role": "mlp_out", "window": 1}
    return Trace(torch.ones(4).double(), torch.zeros(4).double(), effects, settings)


def test_a_trace_is_a_row_per_layer():
    result = trace([2])
    lines = shown(report.trace_table(result, {2: 0.5, 3: 0.25})).splitlines()
    row = next(line for line in lines if line.replace("│", " ").split()[:1] == ["3"])
    assert row.replace("│", " ").split() == ["3", f"{result.scores[3]:.4f}", f"{result.errors[3]:.4f}", "0.2500"]


def test_no_cell_moves_the_cursor(make_run):
    bad = "Ann\x1b[2K\u202e\x07"
    tables = [
        report.answers_table([asked(bad, before=bad, after=bad, expected=bad)], "Answers"),
        report.metrics_table({bad: {bad: 1.0}}, bad),
        report.phases_table({bad: 1.0}, {}, 1),
        report.runs_table([{"run": bad, bad: bad, "model": bad}]),
        report.plugins_table([Plugin(bad, bad, bad, bad, bad)]),
        report.ledger_table([Entry(0, "policy", bad, PolicyBody(outcome=bad, faults=[bad], policy=bad), "", bad)]),
        report.ledger_table([Entry(0, "run", "", body("run", who=bad, model=bad), "", "")]),
    ]
    for text in map(shown, tables):
        assert "Ann" in text
        assert text.replace("\n", "").isprintable()


def test_the_ledger_names_what_was_taken_back_and_what_was_measured():
    requests = [{"subject": name, "target_new": "tennis"} for name in ("Ann", "Bob", "Cleo", "Dan")]
    hashes = ["a" * 64, "b" * 64, "c" * 64, "d" * 64]
    bodies = [
        body("batch", batch=0, hashes=hashes, requests=requests),
        body("evaluation", stage="after", edits=1, metrics={"learned": 0.75, "neutral/kl": 0.1}),
        body("evaluation", stage="after", edits=2, metrics={}),
        body("batch", batch=1, hashes=["e" * 64], requests=[], undone=[hashes[1]], undoes=0),
        body("batch", batch=2, hashes=["e" * 64], requests=[]),
    ]
    text = shown(report.ledger_table([Entry(i, "kind", "", each, "", "") for i, each in enumerate(bodies)]))
    for words in (
        "batch 0, 4 edits: Ann -> tennis, Bob -> tennis, Cleo -> tennis, ...",
        "after, 1 edit: learned 75.0 ",
        "after, 2 edits ",
        "batch 1, 1 fact taken back: Bob -> tennis",
        "batch 2, 1 edit ",
    ):
        assert words in text


def fact(taken=True, reason=""):
    return FactBody(taken=taken, probability=0.5, arrived=1, walks=1, reason=reason)


def test_the_verdict_counts_what_took_and_names_what_did_not():
    requests = tuple(EditRequest("{} plays", name, "tennis") for name in ("Ann", "Bob"))
    first = EditStep(requests, facts=[fact(), fact(False, "blocked")], number=0)
    second = EditStep((), hashes=("a",), facts=[fact(False, "search")], number=1)
    assert report.verdict([]) == report.verdict([EditStep(requests)]) == ""
    assert report.verdict([EditStep(requests, facts=[fact(), fact()])]) == "2 of 2 facts learned"
    words = "1 of 3 facts learned; not learned: 'Bob plays' (blocked), fact 0 of batch 1 (search)"
    assert report.verdict([first, second]) == words
    many = [replace(second, hashes=(str(each),)) for each in range(12)]
    assert report.verdict(many).endswith(", fact 0 of batch 1 (search) and 2 more")
    again = EditStep(requests[1:], facts=[fact()], number=2)
    assert report.verdict([first, again]) == "2 of 2 facts learned"  # its last batch counts
