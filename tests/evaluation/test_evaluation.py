"""Evaluations: what is asked, what is answered, and what a run folder keeps of it."""

import csv
import json
import math
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import SumMetric

from cakeflow import Contexts, Editor, EditRequest, Evaluation, LocateThenEdit, Probe
from cakeflow.data import builtin_facts
from cakeflow.data.text import plain, until_stop
from cakeflow.errors import ConfigError
from cakeflow.evaluation.evaluation import free_prompts
from cakeflow.evaluation.scoring import score_records, score_targets, scored_prompts
from cakeflow.forward.generation import continuations
from cakeflow.journal.schema import EvaluatedRequest
from cakeflow.metrics import KINDS, Fluency
from cakeflow.metrics.text import fluency
from cakeflow.models import Site
from evaluation.replies import says

RECORDS = builtin_facts()[:5]
EVERYTHING = Evaluation(answer_tokens=4, texts_every=2, text_tokens=24, seed=3)


def test_answers_are_what_the_parts_say(tiny):
    """Scores, free-running answers and free texts, in the order of the records."""
    result = EVERYTHING.ask(tiny, RECORDS, first=1)
    alone = score_records(tiny, RECORDS)
    for name in ("expected", "rival", "correct", "tokens", "record", "kind"):
        torch.testing.assert_close(getattr(result.scores, name), getattr(alone, name), equal_nan=True)
    assert alone.answered.isnan().all()
    asked = list(scored_prompts(RECORDS))
    said = [until_stop(text) for text in continuations(tiny, [question.prompt for question in asked], 4)]
    right = [plain(text) == plain(question.expected) for text, question in zip(said, asked, strict=True)]
    assert result.scores.answered.tolist() == right
    assert [bool(texts) for texts in result.texts] == [False, True, False, True, False]  # numbers 1 to 5
    for record, texts in zip(RECORDS, result.texts, strict=True):
        assert all(text.startswith(prompt) for prompt, text in zip(free_prompts(record), texts, strict=False))
        assert len(texts) in (0, len(free_prompts(record)))


def test_free_answers_count_when_they_are_right(tiny):
    """The wanted target is what the model says, once up to a stop, once with other case and punctuation."""
    (said,) = continuations(tiny, ["The sea is"], 4)
    said = until_stop(said).strip()
    right = EditRequest(
        "{} is", "The sea", f"{said.upper()}!", probes=(Probe("paraphrase", "The sea is", f"not {said}"),)
    )
    scores = Evaluation(answer_tokens=4).ask(tiny, [right]).scores
    assert plain(said)
    assert scores.answered.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("target", ["St. Petersburg", "3.5 million", "J. K. Rowling", "Apple Inc.", "北京", "「東京」"])
@pytest.mark.parametrize("ending", [". It is", ".", "\nIt is", "。他"])
def test_a_right_answer_counts_where_a_reader_ends_it(lm, target, ending):
    says(lm, f" {target}{ending}")
    records = [EditRequest("{} is in", "Lund", target), EditRequest("{} is in", "Lund", f"{target} too")]
    assert Evaluation(answer_tokens=60).ask(lm, records).scores.answered.tolist() == [1, 0]


def test_parts_say_the_same_as_the_whole(tiny):
    """However records are split into batches, samples included."""
    whole = EVERYTHING.ask(tiny, RECORDS)
    for index, record in enumerate(RECORDS):
        part = EVERYTHING.ask(tiny, [record], first=index)
        assert part.texts[0] == whole.texts[index]
        (alone,), among = (row.to_dict() for row in part.rows(index)), list(whole.rows())[index].to_dict()
        for one, other in zip(alone.pop("prompts"), among.pop("prompts"), strict=True):
            assert one == pytest.approx(other, abs=1e-5)
        assert alone == among


def test_rows_hold_every_prompt(tiny):
    result = EVERYTHING.ask(tiny, RECORDS)
    rows = json.loads(json.dumps([row.to_dict() for row in result.rows(first=7)], allow_nan=False))
    assert [row["index"] for row in rows] == [7, 8, 9, 10, 11]
    asked = iter(enumerate(scored_prompts(RECORDS)))
    for record, row in zip(RECORDS, rows, strict=True):
        assert {name: row[name] for name in ("case_id", "prompt", "subject", "target_new", "relation")} == {
            name: getattr(record, name) for name in ("case_id", "prompt", "subject", "target_new", "relation")
        }
        for entry in row["prompts"]:
            place, question = next(asked)
            assert (entry["kind"], entry["prompt"]) == (KINDS[question.kind], question.prompt)
            assert (entry["expected"], entry["rival"]) == (question.expected, question.rival)
            assert entry["expected_logprob"] == pytest.approx(float(result.scores.expected[place]))
            assert entry["rival_logprob"] == pytest.approx(float(result.scores.rival[place]))
            assert entry["correct"] == bool(result.scores.correct[place])
    assert [len(row["generations"]) for row in rows] == [2, 0, 2, 0, 2]
    assert next(asked, None) is None


def test_rows_say_which_requests_have_a_space_of_their_own(tiny):
    records = [EditRequest("{} is in", "Lund", "Peru", space=space) for space in (None, False)]
    rows = [row.to_dict() for row in Evaluation().ask(tiny, records).rows()]
    assert [row["space"] for row in rows] == [None, False]
    assert [EvaluatedRequest.model_validate(row).space for row in rows] == [None, False]
    del rows[0]["space"]  # as in files of 0.1
    assert EvaluatedRequest.model_validate(rows[0]).space is None


def test_a_prompt_without_a_rival_has_null(tiny):
    (row,) = Evaluation().ask(tiny, [EditRequest("{} is in", "Lund", "Peru")]).rows()
    assert (row.prompts[0].rival_logprob, row.prompts[0].answered) == (None, None)
    assert {"rival_logprob": None, "answered": None}.items() <= row.to_dict()["prompts"][0].items()


def test_metrics_follow_what_is_asked():
    rates = {"efficacy", "generalization", "specificity"}
    least = {*rates, *(f"{name}_{form}" for name in rates for form in ("exact", "tokens")), "editscore"}
    assert set(Evaluation().metrics()) == least
    assert set(EVERYTHING.metrics()) == least | {f"{name}_answer" for name in rates} | {"fluency", "consistency"}


def test_a_metric_of_the_users_own_replaces_a_text_metric_and_no_other():
    mine = Fluency()
    assert EVERYTHING.metrics([mine])["fluency"] is mine

    class Efficacy(SumMetric):
        """One with a name that is taken."""

    with pytest.raises(ConfigError, match="there is a metric 'efficacy' already"):
        Evaluation().metrics([Efficacy()])


def test_ids_differ_where_numbers_would():
    changes = {"protocol": "official", "answer_tokens": 9, "texts_every": 1, "seed": 8, "top_k": 2, "text_tokens": 30}
    base = replace(EVERYTHING, texts_every=1)
    ids = {replace(base, **{name: value}).id for name, value in changes.items()}
    assert len(ids) == len(changes)  # every record or every second one: the same kind of number
    assert base.id in ids
    assert (Evaluation().id, Evaluation("official").id) == ("clean-v2", "official-v1")


@pytest.mark.parametrize(
    ("name", "value"),
    [("protocol", "mine"), ("answer_tokens", -1), ("texts_every", -2), ("text_tokens", 1), ("top_k", 0)],
)
def test_bad_values(name, value):
    with pytest.raises(ConfigError, match=f"{name}.* got"):
        Evaluation(**{name: value})


def test_metrics_that_can_judge_nothing_are_an_error_before_anything_is_asked(lm, quiet, caplog):
    """Free texts of records without prompts for them; the default metrics are only left out of the table."""
    bare = [{"prompt": "{} is in", "subject": "Lund", "target_new": "Peru"}]
    module = LocateThenEdit(lm, [1], evaluation=Evaluation(texts_every=1))
    with pytest.raises(ConfigError, match="no record can feed fluency: generation is missing in 1 of 1 records"):
        Editor(module, quiet).fit(bare)
    assert not len(module.journal)
    result = Editor(LocateThenEdit(lm, [1]), quiet).evaluate(bare)
    assert "specificity" not in result.metrics
    assert "efficacy_exact" in result.metrics
    assert not [record for record in caplog.records if record.name.startswith("cakeflow.data")]
    Editor(LocateThenEdit(lm, [1]), quiet).evaluate([*bare, RECORDS[0]])
    (said,) = [record.message for record in caplog.records if record.name.startswith("cakeflow.data")]
    assert "efficacy: target_true is missing in 1 of 2 records" in said
    assert "efficacy_exact" not in said


def test_a_model_that_writes_nothing_is_an_error_before_the_edit(lm, quiet):
    """Its first token always ends the text."""
    head = torch.nn.Linear(lm.head.in_features, lm.head.out_features, dtype=lm.dtype)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    head.bias.data[lm.tokenizer.eos_token_id] = 90.0
    lm.model.set_output_embeddings(head)
    module = LocateThenEdit(lm, [1], evaluation=Evaluation(texts_every=1, top_k=1))
    with pytest.raises(ConfigError, match="wrote nothing after any of 10 prompts"):
        Editor(module, quiet).fit(RECORDS)
    assert not len(module.journal)


def test_run_folder_keeps_every_answer(lm, tmp_path, quiet):
    """Before and after, one line per record, whatever the batches; the metrics follow from them."""
    module = LocateThenEdit(lm, [1], moments={1: torch.eye(lm.key_width(Site(1, "mlp_out")))}, evaluation=EVERYTHING)
    module.targets = replace(module.targets, steps=2)
    trainer = {**quiet, "logger": CSVLogger(tmp_path)}
    run = Editor(module, trainer).fit(RECORDS)
    for stage, metrics in (("before", run.before), ("after", run.after)):
        rows = [json.loads(line) for line in (run.folder / f"{stage}.jsonl").read_text().splitlines()]
        assert [row["subject"] for row in rows] == [record.subject for record in RECORDS]
        hits = [row["prompts"][0]["expected_logprob"] > row["prompts"][0]["rival_logprob"] for row in rows]
        assert metrics["efficacy"] == pytest.approx(sum(hits) / len(hits))
        texts = [[each["prompt"] + each["text"] for each in row["generations"]] for row in rows if row["generations"]]
        means = [sum(map(fluency, each)) / len(each) for each in texts]
        assert metrics["fluency"] == pytest.approx(sum(means) / 3, abs=1e-5)
    about = json.loads((run.folder / "run.json").read_text())
    assert about["protocol"] == run.protocol == EVERYTHING.id
    assert about["edits"] == 5
    for name, value in about["metrics"]["after"].items():
        assert value == run.after[name] or (value is None and math.isnan(run.after[name]))
    assert about["timings"].keys() >= {"evaluation", "targets", "solve"}


def test_evaluation_during_a_stream(lm, tmp_path, quiet):
    """Every second batch and at the end; each row says how many edits it follows."""
    module = LocateThenEdit(lm, [1], moments={1: torch.eye(lm.key_width(Site(1, "mlp_out")))}, contexts=Contexts())
    module.targets = replace(module.targets, steps=2)
    trainer = {**quiet, "logger": CSVLogger(tmp_path), "val_check_interval": 2}
    run = Editor(module, trainer).fit(RECORDS, batch_size=1)
    with (run.folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["before/efficacy"] or row["after/efficacy"]]
    seen = [(float(row["edits"]), bool(row["after/efficacy"])) for row in rows]
    assert seen == [(0, False), (2, True), (4, True), (5, True)]
    assert float(rows[-1]["after/efficacy_exact"]) == pytest.approx(run.after["efficacy_exact"])
    scores = score_records(lm, RECORDS)
    assert run.after["efficacy_exact"] == pytest.approx(float(scores.correct[scores.kind == 0].float().mean()))
    assert {"n_eff", "layer1/share", "target/loss"} <= set(run.logged)


def test_questions_are_asked_in_another_form_and_shown_in_their_own(tiny):
    """Scores, answers and texts are those of the longer prompts; records and their rows keep their own."""
    record = EditRequest(
        "The {} of Lund", "letter", "a", "the", probes=(Probe("paraphrase", "In Lund"), Probe("generation", "Lund is"))
    )
    evaluation = Evaluation(protocol="wild", answer_tokens=3, texts_every=1, text_tokens=20)
    answers = evaluation.ask(tiny, [record], question="Note {} this: ".__add__)
    longer = ["Note {} this: The letter of Lund", "Note {} this: In Lund"]
    expected = score_targets(tiny, longer, ["a", "a"])[0]
    torch.testing.assert_close(answers.scores.expected, expected)
    (row,) = answers.rows()
    assert [each.prompt for each in row.prompts] == ["The letter of Lund", "In Lund"]
    written = continuations(tiny, longer, 3)
    assert [each.answer for each in row.prompts] == [until_stop(text) for text in written]
    (text,) = continuations(tiny, ["Note {} this: Lund is"], 20, total=True, top_k=5)
    assert row.generations[0].prompt + row.generations[0].text == "Lund is" + text


def test_the_protocol_names_the_condition(lm):
    module = LocateThenEdit(lm, [1])
    assert (module.condition, module.protocol, module.question("a")) == ("", module.evaluation.id, "a")
