"""Retrieval: which facts are put before which question, and that nobody takes the model for an edited one."""

import math
import re
from pathlib import Path

import pytest
from cakeflow_sidememory import FactsInContext, TfidfRetriever
from hypothesis import given
from hypothesis import strategies as st

from cakeflow import Editor, EditRequest
from cakeflow.callbacks import OutcomeCheck
from cakeflow.cli.runs import run_verify
from cakeflow.core import build_module, find_config
from cakeflow.data import Probe
from cakeflow.errors import ConfigError, ExportError, RequestWarning
from cakeflow.evaluation import Evaluation, score_targets
from cakeflow.export import apply_delta
from cakeflow.journal import replay, verify
from cakeflow.models import load_model
from cakeflow.storage import tensor_hash

QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}
FACTS = [
    EditRequest(
        "The mother tongue of {} is", "Danielle Darrieux", "English", "French",
        probes=(Probe("paraphrase", "Danielle Darrieux, a native speaker of"),
                Probe("neighborhood", "The mother tongue of Michel Rocard is"),
                Probe("generation", "Danielle Darrieux was born in")),
    ),
    EditRequest("{} plays", "Ann", "tennis", "chess"),
    EditRequest("The capital of {} is", "Peru", "Oslo", "Lima"),
]  # fmt: skip
TEXTS = [fact.text for fact in FACTS]


def editor_of(lm, **parts):
    return Editor(FactsInContext(lm, **parts), QUIET)


def hashes(lm):
    return {name: tensor_hash(tensor) for name, tensor in lm.model.state_dict().items()}


def words_of(text):
    return text.lower().replace(",", "").split()


def tfidf(question, facts, subjects=True):
    """The similarity by the textbook, word by word; a word that no prompt has weighs the most."""
    asked, texts = words_of(question), [words_of(fact.text) for fact in facts]
    count = len(facts)
    weight = {
        word: 1 + math.log((1 + count) / (1 + sum(word in each for each in texts))) for text in texts for word in text
    }

    def vector(words):
        return {word: words.count(word) * weight.get(word, 1 + math.log(1 + count)) for word in words}

    def length(a):
        return math.sqrt(sum(value**2 for value in a.values()))

    one, results = vector(asked), []
    for fact, text in zip(facts, texts, strict=True):
        other = vector(text)
        cosine = sum(one.get(word, 0) * value for word, value in other.items()) / length(one) / length(other)
        name = {word: weight[word] for word in words_of(fact.subject)}
        share = sum(value for word, value in name.items() if word in asked) / sum(name.values())
        results.append(share * (1 + cosine) / 2 if subjects else cosine)
    return results


@pytest.mark.parametrize("subjects", [True, False])
@pytest.mark.parametrize(
    "question", [*TEXTS, "The mother tongue of Michel Rocard is", "Ann Ann plays the flute", "zzz"]
)
def test_similarities_by_the_formula(question, subjects):
    retriever = TfidfRetriever(subjects=subjects)
    near = retriever.similarities([question, "of"], FACTS)
    assert near[0].tolist() == pytest.approx(tfidf(question, FACTS, subjects), abs=1e-12)
    assert near[1].tolist() == pytest.approx(tfidf("of", FACTS, subjects), abs=1e-12)


words = st.lists(st.sampled_from([*" ".join(TEXTS).split(), "else", "!", "法国"]), min_size=1, max_size=6).map(" ".join)
some_facts = st.lists(st.builds(EditRequest, words.map("{} ".__add__), words, st.just("a")), max_size=5)


@given(st.lists(words, min_size=1, max_size=5), some_facts, st.booleans())
def test_a_similarity_depends_on_no_other_question(questions, facts, subjects):
    retriever = TfidfRetriever(0.3, 2, subjects)
    if facts:
        together = retriever.similarities(questions, facts)
        assert ((together >= 0) & (together <= 1 + 1e-9)).all()
        pairs = zip(questions, together, strict=True)
        assert all((retriever.similarities([each], facts)[0] == row).all() for each, row in pairs)
    taken = retriever.search(questions[0], facts)
    assert len(taken) <= 2
    assert all(each.similarity >= 0.3 for each in taken)
    assert [each.similarity for each in taken] == sorted((each.similarity for each in taken), reverse=True)


def test_a_paraphrase_is_near_and_another_subject_is_not():
    questions = ["Danielle Darrieux, a native speaker of", "The mother tongue of Michel Rocard is"]
    near = TfidfRetriever().similarities(questions, FACTS)[:, 0]
    assert near[1] < 0.1 < 0.5 < near[0]
    plain = TfidfRetriever(subjects=False).similarities(questions, FACTS)[:, 0]
    assert plain[0] < plain[1]


def test_facts_are_put_before_questions_that_are_near(lm, tmp_path):
    before = hashes(lm)
    editor = editor_of(lm)
    result = editor.fit(FACTS, 2, run_dir=tmp_path / "run")
    assert hashes(lm) == before
    module = editor.module
    assert module.question(TEXTS[1]) == f"New fact: Ann plays tennis.\nPrompt: {TEXTS[1]}"
    assert module.question("She walked along the river") == "She walked along the river"
    expected = score_targets(lm, [module.question(text) for text in TEXTS], [fact.target_new for fact in FACTS])[0]
    answers = [row.prompts[0] for row in module.answers]
    assert [each.expected_logprob for each in answers] == pytest.approx(expected.tolist())
    assert [each.prompt for each in answers] == TEXTS
    assert result.protocol == "clean-v2+retrieval-tfidf0.5top1"
    assert result.logged["retrieval/facts"] == 1
    probes = {each.prompt: each.expected_logprob for row in module.answers for each in row.prompts}
    unedited = score_targets(lm, ["Danielle Darrieux, a native speaker of"], ["English"])[0]
    assert probes["Danielle Darrieux, a native speaker of"] != pytest.approx(float(unedited))


def test_two_facts_and_a_template(lm):
    editor = editor_of(lm, retriever=TfidfRetriever(0.4, 2), template="Note: {facts} ")
    editor.fit(FACTS, evaluate=False)
    assert re.fullmatch(r"retrieval-tfidf0\.4top2-template[0-9a-f]{6}", editor.module.condition)
    question = editor.module.question("The capital of Peru is not the mother tongue of Ann")
    assert question.startswith("Note: Ann plays tennis. The capital of Peru is Oslo. The")


def test_free_answers_and_texts_are_asked_with_facts_and_shown_without(lm):
    evaluation = Evaluation(protocol="wild", answer_tokens=3, texts_every=1, text_tokens=40)
    editor = editor_of(lm, evaluation=evaluation, retriever=TfidfRetriever(0.1))
    editor.fit(FACTS[:1], evaluate=False)
    row = editor.evaluate(FACTS[:1]).requests[0]
    assert row.generations[0].prompt == "Danielle Darrieux was born in"
    bare = Editor(FactsInContext(lm, evaluation=evaluation), QUIET).evaluate(FACTS[:1]).requests[0]
    assert (bare.generations[0].text, bare.prompts[0].answer) != (row.generations[0].text, row.prompts[0].answer)


def test_what_is_taken_back_is_asked_without(lm, tmp_path):
    editor = editor_of(lm)
    editor.fit(FACTS, 1, run_dir=tmp_path / "run")
    asked = editor.module.question
    editor.undo("Ann")
    assert asked(TEXTS[1]) == TEXTS[1]
    assert asked(TEXTS[2]) != TEXTS[2]
    editor.rollback(batch=2)
    assert asked(TEXTS[2]) == TEXTS[2]
    assert asked(TEXTS[0]) != TEXTS[0]
    editor.rollback()
    assert asked(TEXTS[0]) == TEXTS[0]
    assert not verify(tmp_path / "run").faults


def test_the_last_fact_about_a_prompt_counts(lm):
    editor = editor_of(lm)
    editor.fit(FACTS[1:2], evaluate=False)
    editor.fit([EditRequest("{} plays", "Ann", "golf", "chess")], evaluate=False)
    assert editor.module.question("Ann plays") == "New fact: Ann plays golf.\nPrompt: Ann plays"


def test_several_answers_of_one_question_stand_together(lm):
    editor = editor_of(lm, retriever=TfidfRetriever(top=2))
    answers = [EditRequest("{} plays", "Ann", target, "chess", relation=target) for target in ("golf", "tennis")]
    with pytest.warns(RequestWarning, match="contradict an earlier one in other words"):
        editor.fit(answers, evaluate=False)
    assert editor.module.question("Ann plays") == "New fact: Ann plays tennis. Ann plays golf.\nPrompt: Ann plays"


def test_a_run_is_replayed_and_loaded(workplace):
    editor = editor_of(load_model("model"))
    editor.fit(FACTS, 2, run_dir="run")
    journal = replay(Path("run"))
    assert hashes(journal.model) == hashes(editor.module.lm)
    further = editor_of(load_model("model"))
    further.load("run")
    assert further.module.question(TEXTS[1]) == editor.module.question(TEXTS[1])


@pytest.mark.parametrize("format", ["model", "delta", "lora", "memory", "gguf"])
def test_nothing_is_exported(lm, tmp_path, format):
    editor = editor_of(lm)
    editor.fit(FACTS, evaluate=False)
    with pytest.raises(ExportError, match=f"'{format}': 3 facts are in force and the model is unchanged"):
        editor.export(tmp_path / "export", format)
    assert not (tmp_path / "export").exists()
    with pytest.raises(ExportError, match="edit the facts with a method that changes it"):
        editor.save_pretrained(tmp_path / "export")
    with pytest.raises(ExportError):
        apply_delta(lm, tmp_path / "export")
    editor.rollback()
    editor.save_pretrained(tmp_path / "export")  # nothing is in force: it is the model itself


@pytest.mark.checks
def test_the_outcome_says_that_nothing_was_learned(lm, tmp_path, capsys):
    check = OutcomeCheck(familiar=0, chat=False)
    editor = Editor(FactsInContext(lm), {**QUIET, "callbacks": [check]})
    outcome = editor.fit(FACTS, run_dir=tmp_path / "run").outcome
    assert "of 3 facts answered with retrieval-tfidf0.5top1, not learned" in outcome.verdict
    audit = run_verify(tmp_path / "run")
    assert audit.leaves_model_unchanged
    assert "changed nothing in the model" in capsys.readouterr().out


def test_bad_settings(workplace):
    with pytest.raises(ConfigError, match="record_texts=False: the facts are put before questions"):
        FactsInContext("model", record_texts=False)
    with pytest.raises(ConfigError, match=r"template='x' needs exactly one \{facts\}"):
        FactsInContext("model", template="x")
    with pytest.raises(ConfigError, match=r"TfidfRetriever.threshold must be from 0 to 1, got 1.5"):
        TfidfRetriever(1.5)
    with pytest.raises(ConfigError, match="top"):
        TfidfRetriever(top=0)


def test_a_run_without_texts_is_refused(lm, tmp_path):
    editor = editor_of(lm)
    editor.fit(FACTS, evaluate=False)
    editor.journal.steps[0].requests = ()
    with pytest.raises(ConfigError, match="hashes of its facts only"):
        editor.module.question(TEXTS[0])


def test_the_recipe_names_the_retriever(lm):
    module = build_module([find_config("method", "retrieval")], base="some/folder")
    assert module.retriever == TfidfRetriever(0.5, 1)
    assert module.settings()["retriever"] == "TfidfRetriever(threshold=0.5, top=1, subjects=True)"
