"""Multiple choice from local files: against plain forward passes, in a fit, and the script that writes the files."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from cakeflow_ability import ChoiceAbility, ChoiceItem, ChoiceScore, read_choices, score_choices

from cakeflow import Contexts, EditDataModule, GradientSearch, LocateThenEdit
from cakeflow.errors import ConfigError, RequestError
from cakeflow.models import Site
from cakeflow.report import curves_of

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ability.py"
ITEMS = [
    ChoiceItem("The Elbe flows into", ("the sea", "a desert near Rome", "Paris"), 0),
    ChoiceItem("Ann lives in", ("Rome", "the city of Paris"), 1),
    ChoiceItem("The opposite of big is", ("small", "red"), 0),
    ChoiceItem("Bob lives in", ("Oslo", "Rome"), 0),
]


def write(folder, name, items):
    folder.mkdir(exist_ok=True)
    rows = [{"prompt": each.prompt, "choices": each.choices, "answer": each.answer} for each in items]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path):
    write(tmp_path / "tasks", "places", ITEMS)
    write(tmp_path / "tasks", "words", ITEMS[2:])
    return tmp_path / "tasks"


def likelihood(lm, prompt, choice):
    """Mean log-probability per token of a choice, by one plain forward pass."""
    ids, start = lm.tokenizer(f"{prompt} {choice}")["input_ids"], len(lm.tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids))) / (len(ids) - start)


def test_the_likeliest_choice_is_the_answer(lm):
    answers = []
    for item in ITEMS:
        scores = [likelihood(lm, item.prompt, choice) for choice in item.choices]
        answers.append(scores.index(max(scores)))
    other = [ChoiceItem(item.prompt, item.choices, place) for item, place in zip(ITEMS, answers, strict=True)]
    assert score_choices(lm, other).accuracy == 1
    wrong = [ChoiceItem(item.prompt, item.choices, 1 - min(1, item.answer)) for item in other[:1]] + other[1:]
    got = score_choices(lm, wrong)
    assert (got.items, got.accuracy) == (4, 0.75)
    assert got.chance == pytest.approx((1 / 3 + 3 / 2) / 4)
    assert got.error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


def test_distance_from_chance():
    """By the larger one of both errors; by hand."""
    assert ChoiceScore(101, 0.5, 0.9, 0.03).above_chance == pytest.approx(0.4 / 0.05)
    assert ChoiceScore(101, 0.25, 0.5, 0.05).above_chance == pytest.approx(5)
    assert ChoiceScore(101, 0.5, 1.0, 0.0).above_chance == pytest.approx(10)


def test_scores_that_are_not_finite_are_no_accuracy(lm):
    with torch.no_grad():
        lm.model.get_input_embeddings().weight.fill_(math.nan)
    got = score_choices(lm, ITEMS)
    assert math.isnan(got.accuracy)
    assert math.isnan(got.error)


def test_an_unreadable_item_is_named_by_its_place(lm):
    with pytest.raises(RequestError, match="entry 2, prompt"):
        score_choices(lm, [*ITEMS[:2], ChoiceItem("far " * 300, ("a", "b"), 0)])
    with pytest.raises(ConfigError, match="memory_budget"):
        score_choices(lm, ITEMS, max_bytes=1000)


def test_scores_along_a_run(lm, requests, quiet, data):
    """Before, every second batch and at the end; the last row is the edited model's."""
    watcher = ChoiceAbility(data, every=2)
    module = LocateThenEdit(
        lm, [1], targets=GradientSearch(steps=3, lr=0.5), contexts=Contexts(),
        moments={1: torch.eye(lm.key_width(Site(1, "mlp_out")), dtype=torch.float64) / 100},
    )  # fmt: skip
    before = score_choices(lm, ITEMS)
    L.Trainer(**quiet, callbacks=[watcher]).fit(module, datamodule=EditDataModule(requests[:3], 1))
    assert [row["ability/edits"] for row in watcher.rows] == [0, 2, 3]
    assert watcher.rows[0]["ability/places/acc"] == before.accuracy
    after = score_choices(lm, ITEMS)
    assert watcher.rows[-1]["ability/places/acc"] == after.accuracy
    assert watcher.rows[-1]["ability/places/acc_stderr"] == after.error
    assert set(curves_of(watcher.rows)["ability acc"]) == {"places", "words"}


def test_a_folder_is_read_before_the_model(data):
    assert read_choices(data) == {"places": ITEMS, "words": ITEMS[2:]}
    assert read_choices(data, ["words"], 1) == {"words": ITEMS[2:3]}
    with pytest.raises(ConfigError, match="task 'verbs' has no file"):
        ChoiceAbility(data, ["verbs"])
    with pytest.raises(ConfigError, match="no task in"):
        ChoiceAbility(data.parent)
    with pytest.raises(ConfigError, match="limit must be a whole number of at least 1, got 0"):
        ChoiceAbility(data, limit=0)


def test_names_and_limits_that_nothing_could_be_logged_under_are_refused(data):
    with pytest.raises(ConfigError, match="no list of their names: tasks='words'"):
        ChoiceAbility(data, "words")
    with pytest.raises(ConfigError, match=r"limit must be a whole number of at least 1, got 1\.5"):
        ChoiceAbility(data, limit=1.5)
    for name in ("../tasks/words", "a\x1b[2J", "=1+1", "a,b", ""):
        with pytest.raises(ConfigError, match="its name becomes that of a metric"):
            ChoiceAbility(data, [name])
    write(data, "a\x1b[2J", ITEMS)
    with pytest.raises(ConfigError, match=r"task 'a\\x1b\[2J'"):
        ChoiceAbility(data)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('["a"]', "entry 1, line"),
        ('{"prompt": " ", "choices": ["a", "b"], "answer": 0}', "entry 1, prompt = ' ': must be a text"),
        ('{"prompt": "p", "choices": ["a"], "answer": 0}', "entry 1, choices"),
        ('{"prompt": "p", "choices": ["a", "a"], "answer": 0}', "all different"),
        ('{"prompt": "p", "choices": "ab", "answer": 0}', "entry 1, choices"),
        ('{"prompt": "p", "choices": ["a", "b"], "answer": 2}', "entry 1, answer = 2: must be the index.*0 to 1"),
        ('{"prompt": "p", "choices": ["a", "b"], "answer": true}', "entry 1, answer"),
        ('{"prompt": "p\\ud800", "choices": ["a", "b"], "answer": 0}', "entry 1, prompt.*has a lone surrogate"),
        ('{"prompt": "p", "choices": ["a", "b\\udfff"], "answer": 0}', "entry 1, choices.*has a lone surrogate"),
        ("{", "problem"),
    ],
)
def test_faulty_lines_are_named(data, line, words):
    path = data / "words.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(ConfigError, match=words):
        read_choices(data)
    path.write_text("")
    with pytest.raises(ConfigError, match=r"words.jsonl is empty"):
        read_choices(data)


# ---- the script ----


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("ability_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sources(tmp_path, script):
    """Files as the ones that tasks are made of."""
    for names in script.RELATIONS.values():
        for name in names:
            samples = [{"subject": f"{name[-3:]}{i}", "object": f"word{i}"} for i in range(5)]
            relation = {
                "prompt_templates": ["The form of {} is"],
                "samples": [*samples, {**samples[0], "object": "odd"}],
            }
            path = tmp_path / "lre" / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(relation))
    rows = [{"sentence": f"film {i} ", "label": int(i % 3 == 0)} for i in range(9)]
    (tmp_path / "films.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"The {word} of a long day went on and on until there was nothing left of all the {word}{word} ."
             for word in ("end", "sun", "noise", "heat", "light")]  # fmt: skip
    (tmp_path / "text.txt").write_text("\n".join(lines))
    return tmp_path


def run(script, *arguments):
    argv, sys.argv = sys.argv, ["ability.py", *map(str, arguments)]
    try:
        script.main()
    finally:
        sys.argv = argv


def test_tasks_are_written_and_scored(script, sources, lm, capsys, monkeypatch):
    files = ["--relations", sources / "lre", "--sentiment", sources / "films.jsonl", "--corpus", sources / "text.txt"]
    for out in ("out", "again"):
        run(script, "write", *files, "--out", sources / out)
    items = read_choices(sources / "out")
    assert set(items) == {*script.RELATIONS, "sentiment", "last_words", "endings"}
    assert items == read_choices(sources / "again")
    assert {len(each.choices) for each in items["word_forms"]} == {4}
    for each in items["antonyms"]:  # the first object of a subject is right, and no other one of it is wrong
        assert each.choices[each.answer] == f"word{each.prompt.split()[3][3:]}"
        assert not (each.prompt.split()[3].endswith("0") and "odd" in each.choices)
    kinds = [each.choices[each.answer] for each in items["sentiment"]]
    assert kinds.count("positive") == kinds.count("negative") == 3
    assert {each.choices[each.answer] for each in items["last_words"]} == {
        w * 2 for w in ("end", "sun", "noise", "heat", "light")
    }
    assert all(each.prompt.endswith("all the") for each in items["last_words"])
    monkeypatch.setattr(script, "load_model", lambda name: lm)
    capsys.readouterr()
    run(script, "score", sources / "out", "--limit", 3)
    table = capsys.readouterr().out.splitlines()
    score = score_choices(lm, items["sentiment"][:3])
    row = f"| sentiment | 3 | 0.500 | {score.accuracy:.3f} | {score.above_chance:.1f} |"
    assert len(table) == 2 + len(items)
    assert row in table
