"""Judges: what each takes as right, what a judge may not say, and how far they agree with a reader."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cakeflow import EditRequest, Evaluation, Probe
from cakeflow.data.text import plain, states, until_any_stop, until_stop
from cakeflow.errors import ConfigError, JudgeError
from cakeflow.evaluation.judges import (
    VERDICTS,
    CallableJudge,
    Containment,
    ExactMatch,
    Judge,
    JudgedAnswer,
    ModelJudge,
    Stated,
    agreement,
    as_judge,
    verdicts,
)
from cakeflow.forward.generation import continuations
from evaluation.replies import says

LABELS = Path(__file__).parents[2] / "benchmarks"
RECORD = EditRequest(
    "{} is", "The sea", "calm", "wild", probes=(Probe("paraphrase", "Now the sea is"), Probe("neighborhood", "Lund is"))
)


def labelled(name="judge_labels", draw=1):
    rows = [json.loads(line) for line in (LABELS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row.get("draw", 1) == draw]
    items = [JudgedAnswer(r["question"], r["expected"], r["answer"], r["subject"], r["kind"] == "chat") for r in rows]
    return items, [row["right"] for row in rows]


@pytest.mark.parametrize(
    ("judge", "counts"),
    [(ExactMatch(), (43, 28, 40)), (Containment(), (54, 50, 51)), (Stated(), (57, 51, 52))],
    ids=lambda each: str(each),
)
def test_agreement_with_answers_that_were_labelled_by_hand(judge, counts):
    sets = [labelled(), labelled("judge_labels_fresh"), labelled("judge_labels_fresh", 2)]
    assert [(len(items), sum(labels)) for items, labels in sets] == [(60, 32), (53, 32), (54, 22)]
    shares = [agreement(judge.judge(items), labels) for items, labels in sets]
    assert shares == pytest.approx([count / len(items) for count, (items, _) in zip(counts, sets, strict=True)])
    if judge == Stated():
        assert min(shares) >= 0.95


def test_the_rules_differ_where_they_should():
    answer = JudgedAnswer("Lund is in", "Sweden", "Oslo lies in the south of Sweden", "Lund", chat=True)
    assert [each.judge([answer]) for each in (ExactMatch(), Containment(), Stated())] == [[0], [1], [0]]
    assert Stated().judge([answer._replace(chat=False), answer._replace(answer="Lund is in Sweden")]) == [1, 1]
    assert Stated().judge([answer._replace(subject="")]) == [1]


def test_a_function_is_a_judge():
    def longer(question, expected, answer):
        return len(answer) > len(question) + len(expected)

    judge = as_judge(longer)
    assert (judge.name, CallableJudge(longer, "mine").name) == ("longer", "mine")
    assert judge.judge([JudgedAnswer("a", "b", "ccc"), JudgedAnswer("a", "b", "cc")]) == [1.0, 0.0]
    assert as_judge(ExactMatch()) == ExactMatch()


@pytest.mark.parametrize("value", [None, "yes", 2.0, float("nan"), torch.tensor(1.0)])
def test_a_judge_that_says_nonsense_is_an_error_that_names_the_answer(value):
    with pytest.raises(JudgeError, match="of the answer 'Peru' to 'Lund is in'; a judge has to say True, False"):
        CallableJudge(lambda *_: value).judge([JudgedAnswer("Lund is in", "Sweden", "Peru")])


@pytest.mark.parametrize("judge", ["exact", 3, ExactMatch])
def test_what_is_no_judge_is_refused(judge):
    with pytest.raises(ConfigError, match="a judge is a Judge or a function"):
        Evaluation("wild", judge=judge)


@pytest.mark.parametrize("word", VERDICTS)
def test_a_model_judges_by_the_first_word_of_its_reply(lm, word):
    says(lm, f" {word.upper()}.")
    answers = [JudgedAnswer("Lund is in", "Sweden", "{expected}"), JudgedAnswer("Lund is in", "Peru", "Chile")]
    assert verdicts(lm, answers, tokens=40) == [VERDICTS[word]] * 2


def test_a_model_is_asked_with_all_three_texts_and_no_text_is_a_place(lm, monkeypatch):
    prompts = []

    def continued(_, texts, tokens):
        prompts.extend(texts)
        return [" yes"] * len(texts)

    monkeypatch.setattr("cakeflow.evaluation.judges.continuations", continued)
    verdicts(lm, [JudgedAnswer("a {answer} b", "{question}", " c ")], "{question}|{expected}|{answer}|{x}")
    assert prompts == ["a {answer} b|{question}|c|{x}"]


def test_a_model_that_says_nonsense_is_an_error(lm):
    says(lm, " perhaps")
    with pytest.raises(JudgeError, match=r"says ' perhaps'.*has to say yes or no: use a larger model"):
        verdicts(lm, [JudgedAnswer("Lund is in", "Sweden", "Peru")], tokens=40)


def test_a_model_judge_loads_its_model_when_it_judges():
    judge = ModelJudge("no-such-model")
    assert (judge.name, judge.judge([])) == ("ModelJudge(no-such-model)", [])
    with pytest.raises(ConfigError, match=r"this one lacks \['{expected}'\]"):
        ModelJudge("smollm2-135m", "{question} {answer}")
    with pytest.raises(ConfigError, match="tokens = 0"):
        ModelJudge("smollm2-135m", tokens=0)


# ---- the protocols of free answers ----


@pytest.mark.parametrize(("protocol", "cut"), [("wild", until_stop), ("wild_official", until_any_stop)])
def test_free_answers_are_those_of_the_parts(tiny, protocol, cut):
    evaluation = Evaluation(protocol)
    asked = evaluation.ask(tiny, [RECORD])
    prompts = ["The sea is", "Now the sea is", "Lund is"]
    assert asked.answers == [cut(text) for text in continuations(tiny, prompts, 32)]
    pairs = list(zip(asked.answers, ["calm", "calm", "wild"], strict=True))
    assert asked.scores.answered.tolist() == [plain(text) == plain(name) for text, name in pairs]
    assert asked.scores.contained.tolist() == [states(text, name) for text, name in pairs]
    items = [JudgedAnswer(*each) for each in zip(prompts, ["calm", "calm", "wild"], asked.answers, strict=True)]
    assert asked.scores.judged.tolist() == Stated().judge(items)
    assert Evaluation(protocol, judge=ExactMatch()).ask(tiny, [RECORD]).scores.judged.isnan().all()
    clean = Evaluation().ask(tiny, [RECORD]).scores
    torch.testing.assert_close(asked.scores.expected, clean.expected)
    (row,) = asked.rows()
    assert [each.answer for each in row.prompts] == asked.answers
    assert [each.contained for each in row.prompts] == asked.scores.contained.tolist()


@pytest.mark.parametrize(("protocol", "right"), [("wild", 1.0), ("wild_official", 0.0)])
def test_the_official_cut_is_at_any_full_stop(lm, protocol, right):
    says(lm, " St. Petersburg. It is old")
    records = [EditRequest("{} is in", "The river", "St. Petersburg")]
    scores = Evaluation(protocol).ask(lm, records).scores
    assert (scores.answered.tolist(), scores.contained.tolist()) == ([right], [right])


def test_a_judge_has_a_metric_of_its_own_beside_teacher_forcing(tiny):
    @dataclass(frozen=True)
    class Half(Judge):
        def judge(self, answers):
            return [0.5 * each.chat + 0.25 * (each.subject == "The sea") for each in answers]

    evaluation = Evaluation("wild", judge=Half())
    metrics = evaluation.metrics()
    metrics.update(**evaluation.ask(tiny, [RECORD]).fields())
    values = metrics.compute()
    names = {f"{rate}_{form}" for rate in ("efficacy", "generalization") for form in ("exact", "answer", "contained")}
    assert names < set(values)
    assert (float(values["efficacy_judged"]), float(values["generalization_judged"])) == (0.25, 0.0)
    assert "efficacy_judged" not in Evaluation("wild", judge=ExactMatch()).metrics()
    assert "efficacy_judged" not in Evaluation(answer_tokens=4).metrics()
    assert evaluation.id == "wild-v1+answers32v2+Half"
    assert Evaluation("wild_official", chat=True).id == "wild_official-v1+answers32v2+chat+Stated"
    assert (Evaluation(answer_tokens=4).id, Evaluation().judge) == ("clean-v2+answers4v2", ExactMatch())


def test_a_chat_asks_prompts_as_the_users_turn(lm):
    lm.tokenizer.chat_template = "{% for each in messages %}{{ each['content'] }}{% endfor %}? Answer:"
    asked = Evaluation("wild", chat=True).ask(lm, [RECORD])
    assert asked.answers[0] == until_stop(continuations(lm, ["The sea is? Answer:"], 32)[0])


def test_what_needs_free_answers_or_a_template_says_so(lm):
    lm.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="cannot write 'Hello' as a chat"):
        Evaluation("wild", chat=True).check(lm)
    Evaluation("wild").check(lm)
    for settings in ({"chat": True}, {"judge": Containment()}):
        with pytest.raises(ConfigError, match="set protocol to wild"):
            Evaluation(**settings)
