"""Questions with several answers from PEAK's records, and the four tasks."""

import json

import pytest
import torch
from cakeflow_sidememory.answers import SequenceSuccess
from cakeflow_sidememory.tasks import Question, build_task, choose_answers, read_questions, solid

from cakeflow.data import contradictions
from cakeflow.errors import ConfigError, RequestError

RECORD = {
    "case_id": 4,
    "requested_rewrite": {
        "prompt": "{} shares border with", "relation_id": "P47", "subject": "Turkey",
        "target_new": {"str": "Central African"}, "target_true": {"str": "Armenian"},
    },
    "postive_list": ["Syria", "Iran", "Syria", "Georgia (country)"],
    "negtive_list": ["Zambia"],
    "para_add_prompts": ["Turkey is adjacent to"],
    "neighborhood_prompts": [["Vasif Talibov is a citizen of", "Azerbaijan"]],
    "negtive_random_list": ["Sakowitz"],
}  # fmt: skip
TURKEY = Question("{} borders", "Turkey", ("Syria", "Iran"), ("Turkey is adjacent to",), ("Rome is in",), 1)
RUSSELL = Question("{} wrote", "Russell", ("Principia", "Marriage"), ("A book of Russell is", "He wrote"), (), 2)
LUND = Question("{} is near", "Lund", ("Malmö", "Lomma"), (), (), 3)


def written(folder, *records):
    path = folder / "peak.json"
    path.write_text(json.dumps(records))
    return path


def test_records_are_questions(tmp_path):
    (question,) = read_questions(written(tmp_path, RECORD))
    assert question.text == "Turkey shares border with"
    assert question.answers == ("Syria", "Iran", "Georgia (country)")
    assert (question.paraphrases, question.unrelated) == (
        ("Turkey is adjacent to",),
        ("Vasif Talibov is a citizen of",),
    )
    assert (question.case_id, question.relation) == (4, "P47")


def test_faulty_records_are_named_together(tmp_path):
    broken = [
        {**RECORD, "postive_list": []},
        {**RECORD, "requested_rewrite": {"prompt": "no slot", "subject": " "}},
        {**RECORD, "neighborhood_prompts": [["only a prompt"]]},
        {"case_id": 3},
        {**RECORD, "case_id": {}, "postive_list": ["a\ud800"], "para_add_prompts": ["\ud800"]},
        RECORD,
    ]
    with pytest.raises(RequestError) as error:
        read_questions(written(tmp_path, *broken))
    assert [(fault.index, fault.field) for fault in error.value.faults] == [
        (0, "postive_list"),
        (1, "requested_rewrite.subject"),
        (1, "requested_rewrite.prompt"),
        (2, "neighborhood_prompts"),
        (3, "requested_rewrite"),
        (4, "postive_list"),
        (4, "para_add_prompts"),
        (4, "case_id, relation_id"),
    ]
    with pytest.raises(RequestError, match="has no record"):
        read_questions(written(tmp_path))
    with pytest.raises(ConfigError, match="no file or folder"):
        read_questions(tmp_path / "absent.json")


def test_answers_that_the_model_begins_with_are_no_edits(lm):
    ids = torch.tensor([lm.tokenizer("Turkey borders")["input_ids"]])
    likeliest = lm.tokenizer.decode([int(lm(input_ids=ids, use_cache=False).logits[0, -1].argmax())])
    spoken = Question("{} borders", "Turkey", ("Syria", "Iran", "Rome"))
    assert choose_answers(lm, [spoken])[0].answers == ("Syria", "Iran")
    with torch.no_grad():  # the model now answers with the first token of Syria
        first = lm.tokenizer(" Syria")["input_ids"][0]
        lm.head.weight[first] = 100 * lm.head.weight[int(lm.tokenizer(likeliest)["input_ids"][0])]
    assert choose_answers(lm, [spoken])[0].answers[0] != "Syria"


def test_questions_with_too_few_answers_are_left_out(lm):
    chosen = choose_answers(lm, [Question("{} is near", "Lund", ("Malmö",)), TURKEY])
    assert [each.subject for each in chosen] == ["Turkey"]
    with pytest.raises(ConfigError, match="none of 1 questions has 3 answers"):
        choose_answers(lm, [TURKEY], 3)
    with pytest.raises(ConfigError, match="count must be a whole number of at least 1, got 0"):
        choose_answers(lm, [TURKEY], 0)
    with pytest.raises(ConfigError, match="there are no questions"):
        choose_answers(lm, [])


def test_answers_may_be_written_solid(lm):
    question = Question("{} borders", "Turkey", ("Georgia (country)", "Iran, Islamic", "Iran Islamic"))
    assert choose_answers(lm, [question], is_solid=True)[0].answers == ("Georgiacountry", "IranIslamic")
    assert solid("Go West, [Young] (Man)") == "GoWestYoungMan"


def test_all_answers_of_a_question_are_asked_together():
    task = build_task("MAC", [TURKEY, RUSSELL], examples="Q: 1, 2\n")
    assert [edit.target_new for edit in task.edits] == ["Syria", "Iran", "Principia", "Marriage"]
    assert [item.edits for item in task.items] == [(0, 1), (2, 3)]
    assert task.items[0].prompt == "Q: 1, 2\nTurkey borders"
    assert task.items[0].expected == (("Syria", "Iran"),)
    assert task.items[0].paraphrases == ("Q: 1, 2\nTurkey is adjacent to",)
    assert task.items[0].unrelated == ("Rome is in",)


def test_answers_of_a_question_are_asked_alone():
    task = build_task("IMAC", [TURKEY, RUSSELL], examples="Q: 1, 2\n")
    assert [(item.prompt, item.edits, item.expected) for item in task.items[:3]] == [
        ("Turkey borders", (0,), (("Syria",),)),
        ("Turkey borders", (1,), (("Iran",),)),
        ("Russell wrote", (2,), (("Principia",),)),
    ]


def test_two_questions_are_asked_in_one_prompt():
    task = build_task("MQC", [TURKEY, RUSSELL, LUND])
    assert [edit.target_new for edit in task.edits] == ["Syria", "Principia", "Malmö"]
    (item,) = task.items
    assert item.prompt == 'The answers of the questions "Turkey borders", "Russell wrote" are'
    assert (item.edits, item.expected) == ((0, 1), (("Syria",), ("Principia",)))
    assert item.paraphrases == ('The answers of the questions "Turkey is adjacent to", "A book of Russell is" are',)
    metric = SequenceSuccess()
    metric.update([" Syria, Principia", " Principia, Syria"], [item.expected] * 2)
    assert float(metric.compute()) == 0.5


def test_two_questions_are_asked_alone():
    task = build_task("IMQC", [TURKEY, RUSSELL])
    assert [(item.prompt, item.edits, item.expected) for item in task.items] == [
        ("Turkey borders", (0,), (("Syria",),)),
        ("Russell wrote", (1,), (("Principia",),)),
    ]


def test_edits_of_one_question_do_not_contradict_each_other():
    assert contradictions(build_task("MAC", [TURKEY]).edits) == []


@pytest.mark.parametrize(
    ("task", "questions", "message"),
    [
        ("MAC", [], "MAC needs questions with at least 2"),
        ("IMAC", [TURKEY, Question("{} is", "Lund", ("near",))], "of 2 questions 1 have fewer"),
        ("MQC", [TURKEY], "MQC needs two questions"),
        ("MIX", [TURKEY], "task must be one of MAC, IMAC, MQC, IMQC"),
    ],
)
def test_too_few_questions_or_answers_are_refused(task, questions, message):
    with pytest.raises(ConfigError, match=message):
        build_task(task, questions)
