"""General ability: lm-eval's numbers on tiny models against plain forward passes."""

import json
import logging
import random
import sys
from importlib.resources import files
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
import yaml
from cakeflow_ability.callback import GeneralAbility
from cakeflow_ability.tasks import (
    TASKS,
    Agreement,
    general_ability,
    load_other,
    load_tasks,
    matthews,
    score_tasks,
    weighted_f1,
)
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from many_ranks import start_gloo
from rank_runs import results
from sklearn.metrics import f1_score, matthews_corrcoef
from tasks import FILES, write, write_all

from cakeflow.cli.command_line import run_command
from cakeflow.errors import ConfigError
from cakeflow.evaluation import score_reads
from cakeflow.forward.generation import continuations
from cakeflow.models.architecture import Site
from cakeflow.ranks import together

mpl.use("Agg")


@pytest.fixture
def data(tmp_path):
    return write_all(tmp_path / "ability")


# ---- the tasks ----


@pytest.mark.parametrize(
    ("name", "prompt", "answers", "right"),
    [
        ("sst2", "Film review: a dull film\nSentiment:", (" negative", " positive"), (0, 1, 0)),
        ("cola", "Sentence: He went.\nQuestion: Is this acceptable English?\nAnswer:", (" no", " yes"), (1, 0, 1)),
        (
            "mrpc",
            "First sentence: Ann sings.\nSecond sentence: Ann sings.\n"
            "Question: Do both sentences say the same?\nAnswer:",
            (" no", " yes"),
            (1, 0, 0),
        ),
        (
            "rte",
            "Text: Rome is old.\nStatement: Rome is old.\n"
            "Question: Going by the text, is the statement true or false?\nAnswer:",
            (" true", " false"),
            (0, 1, 1),
        ),
        (
            "nli",
            "Text: Rome is old.\nStatement: Rome is old.\n"
            "Question: Does the statement follow from the text, true or false?\nAnswer:",
            (" true", " false"),
            (0, 1, 1),
        ),
        (
            "mmlu",
            "Question: What is red?\nA: blood\nB: snow\nC: coal\nD: grass\nAnswer:",
            (" A", " B", " C", " D"),
            (0, 3, 1),
        ),
    ],
)
def test_what_a_task_asks_and_what_is_right(name, prompt, answers, right, data):
    task = load_tasks(data, [name])["tasks"][name]
    task.build_all_requests()
    asked = [request.args for request in task.instances]
    assert asked[: len(answers)] == [(prompt, answer) for answer in answers]
    assert tuple(task.doc_to_target(doc) for doc in task.eval_docs) == right


def test_every_shipped_task_is_known():
    assert (
        {path.stem for path in Path(str(files("cakeflow_ability") / "prompts")).glob("*.yaml")}
        == set(TASKS)
        == set(FILES)
    )


def log_likelihood(lm, prompt, answer):
    """Of an answer, by one plain forward pass over prompt and answer alone."""
    ids, start = lm.tokenizer(prompt + answer)["input_ids"], len(lm.tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids)))


def answered(lm, task):
    """(right, given) of each item."""
    pairs = []
    for doc in task.eval_docs:
        likely = [log_likelihood(lm, task.doc_to_text(doc), f" {each}") for each in task.doc_to_choice(doc)]
        pairs.append((task.doc_to_target(doc), max(range(len(likely)), key=likely.__getitem__)))
    return pairs


@pytest.mark.usefixtures("offline")
def test_numbers_are_those_of_plain_forward_passes(tiny, data):
    result = general_ability(tiny, data)
    measures = {"acc", "f1", "mcc"}
    assert set(result) == {f"{task}/{m}{end}" for task in TASKS for m in measures for end in ("", "_stderr")}
    for name, task in load_tasks(data, TASKS)["tasks"].items():
        right, given = zip(*answered(tiny, task), strict=True)
        hits = np.array(right) == np.array(given)
        assert result[f"{name}/acc"] == hits.mean()
        assert result[f"{name}/acc_stderr"] == pytest.approx(hits.std(ddof=1) / len(hits) ** 0.5)
        assert result[f"{name}/f1"] == pytest.approx(f1_score(right, given, average="weighted"))
        assert result[f"{name}/mcc"] == pytest.approx(matthews_corrcoef(right, given))


def test_log_likelihoods_are_those_of_lm_evals_own_model(tiny, data, caplog):
    tasks = load_tasks(data, TASKS)
    score_tasks(tiny, tasks)
    requests = [request for task in tasks["tasks"].values() for request in task.instances]
    with caplog.at_level(logging.ERROR, "lm_eval"):
        expected = HFLM(pretrained=tiny.model, tokenizer=tiny.tokenizer).loglikelihood(requests, disable_tqdm=True)
    for request, (likelihood, exact) in zip(requests, expected, strict=True):
        ((got, hit),) = request.resps
        assert got == pytest.approx(likelihood, abs=1e-4)
        assert hit == exact


def test_long_texts_lose_their_beginning_as_in_lm_eval(lm, tmp_path):
    entry = {"sentence": "once upon a time " * lm.longest, "label": 0}
    write(tmp_path, "cola", [entry, {**entry, "label": 1}])
    assert general_ability(lm, tmp_path, ["cola"])["cola/acc"] == 0.5


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_share_the_items(count, lm, data, tmp_path, monkeypatch):
    """Three items of each task: as many as ranks, and fewer on one of them."""
    sizes = []

    def counted(lm, reads, **options):
        sizes.append(len(reads))
        return score_reads(lm, reads, **options)

    monkeypatch.setattr("cakeflow_ability.tasks.score_reads", counted)
    expected, whole = score_tasks(lm, load_tasks(data, TASKS)), sum(sizes)

    def work(_):
        start_gloo()
        sizes.clear()
        with together():
            return score_tasks(lm, load_tasks(data, TASKS)), sum(sizes)

    ended = results(count, work, tmp_path)
    alone = {name: value for name, value in expected.items() if not name.endswith("_stderr")}
    for numbers, size in ended:
        assert numbers.keys() == expected.keys()
        assert {name: numbers[name] for name in alone} == pytest.approx(alone, abs=1e-12)
        assert numbers == ended[0][0]
        assert size < whole
    assert sum(size for _, size in ended) >= whole


def test_limit_takes_the_first_items(lm, data):
    some = general_ability(lm, data, ["cola"], limit=2)
    write(data, "cola", FILES["cola"][:2])
    assert some == general_ability(lm, data, ["cola"], limit=None)


def test_scores_that_are_not_finite_give_no_number(lm, data):
    lm.weight(Site(0, "mlp_out")).data[:] = torch.nan
    assert all(np.isnan(value) for value in general_ability(lm, data, ["cola"]).values())


# ---- nothing changes ----


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_evaluating_changes_nothing(tiny, data, capfd, caplog):
    tiny.model.train()
    tiny.module(Site(0)).eval()
    tiny.tokenizer.padding_side, tiny.tokenizer.pad_token = "left", None

    def state():
        return (
            random_states(),
            {name: (tensor.data_ptr(), tensor.double().sum()) for name, tensor in tiny.model.state_dict().items()},
            [module.training for module in tiny.model.modules()],
            tiny.tokenizer.padding_side,
            tiny.tokenizer.pad_token,
            len(tiny.tokenizer),
            tiny.model.config.to_dict(),
            tiny.model.generation_config.to_dict(),
            logging.getLogger("lm_eval").level,
        )

    before = state()
    general_ability(tiny, data)
    GeneralAbility(data)
    assert state() == before
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_the_weights_in_memory_are_evaluated(lm, data):
    task = load_tasks(data, ["mmlu"])["tasks"]["mmlu"]
    before = answered(lm, task)
    torch.manual_seed(0)
    with torch.no_grad():
        lm.weight(Site(2, "mlp_out")).add_(torch.randn_like(lm.weight(Site(2, "mlp_out"))), alpha=3.0)
    after = answered(lm, task)
    assert after != before
    assert general_ability(lm, data, ["mmlu"])["mmlu/acc"] == np.mean([right == given for right, given in after])


# ---- metrics ----


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40))
def test_f1_and_mcc_are_scikit_learns(pairs):
    right, given_ = zip(*pairs, strict=True)
    assert Agreement(weighted_f1)(pairs) == pytest.approx(f1_score(right, given_, average="weighted", zero_division=0))
    assert Agreement(matthews)(pairs) == pytest.approx(matthews_corrcoef(right, given_), abs=1e-12)


def test_standard_errors_are_the_spread_of_resampled_items():
    draw = random.Random(0)
    pairs = [(i % 2, i % 2 if draw.random() < 0.7 else 1 - i % 2) for i in range(100)]
    for measure in (weighted_f1, matthews):
        rule = Agreement(measure)
        by_hand = np.std([rule(draw.choices(pairs, k=100)) for _ in range(2000)])
        assert rule.error(pairs) == pytest.approx(by_hand, rel=0.1)
        assert rule.error(pairs * 4) == pytest.approx(by_hand / 2, rel=0.1)


# ---- what is refused, before a model is asked for ----


@pytest.mark.parametrize(
    ("line", "messages"),
    [
        ('{"sentence": "a", "label": 2}', r"entry 1, label = 2: must be one of 0, 1"),
        ('{"sentence": "a"}', r"entry 1, label = None"),
        ('{"sentence": " ", "label": 0}', r"entry 1, sentence = ' '"),
        ('{"text": "a", "label": 0}', r"entry 1, sentence = None"),
        ("[1]", r"entry 1, line = \[1\]: make it a JSON object"),
        ('{"sentence": ', r"line 2, column"),
    ],
)
def test_faulty_lines_are_named(line, messages, tmp_path):
    (tmp_path / "cola.jsonl").write_text('{"sentence": "a", "label": 1}\n' + line)
    with pytest.raises(ConfigError, match=rf"1 problem\(s\) in .*cola\.jsonl[\s\S]*{messages}"):
        GeneralAbility(tmp_path, ["cola"])


def test_every_faulty_line_is_named_whatever_the_limit(tmp_path):
    write(tmp_path, "mmlu", [FILES["mmlu"][0], {**FILES["mmlu"][0], "choices": ["blood", "snow"]}, {"question": 1}])
    with pytest.raises(ConfigError, match=r"4 problem[\s\S]*entry 1, choices[\s\S]*entry 2, question") as caught:
        load_tasks(tmp_path, ["mmlu"], limit=1)
    assert "entry 2, answer" in str(caught.value)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(ConfigError, match=r"task 'rte' has no file .*rte\.jsonl"):
        GeneralAbility(tmp_path, ["rte"])
    write(tmp_path, "rte", [])
    with pytest.raises(ConfigError, match=r"rte\.jsonl is empty; .* sentence1, sentence2 and label"):
        GeneralAbility(tmp_path, ["rte"])


@pytest.mark.parametrize("values", [{"tasks": ()}, {"limit": 0}, {"every": 0}], ids=str)
def test_settings_that_mean_nothing(values, data):
    with pytest.raises(ConfigError, match=next(iter(values))):
        GeneralAbility(data, **values)


@pytest.mark.usefixtures("offline")
def test_a_task_whose_data_cannot_be_had(data):
    with pytest.raises(ConfigError, match=r"task 'arc_easy' cannot be loaded by lm-eval.* need the hub.*sst2, mrpc"):
        load_tasks(data, ["cola", "arc_easy"])  # lm-eval reads its whole catalogue, which takes some 10 s


def test_a_task_that_lm_eval_does_not_know():
    with pytest.raises(ConfigError, match=r"task 'no_such_task' cannot be loaded .*not a registered task"):
        load_other(TaskManager(include_defaults=False), "no_such_task")


@pytest.mark.usefixtures("offline")
def test_a_task_file_of_lm_evals_own_kind(lm, tmp_path):
    (prompt,) = continuations(lm, ["Ann"], tokens=3)
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"ask": "Ann", "say": w}) + "\n" for w in (prompt, "no")))
    task = {
        "task": "echo",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "lines.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{ask}}",
        "doc_to_target": "{{say}}",
        "generation_kwargs": {"until": [], "max_gen_toks": 3},
        "filter_list": [{"name": "plain", "filter": [{"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "echo.yaml").write_text(yaml.safe_dump(task))
    result = score_tasks(lm, load_other(TaskManager(include_defaults=False), str(tmp_path / "echo.yaml")))
    assert result == {"echo/exact_match_plain": 0.5, "echo/exact_match_plain_stderr": 0.5}


def test_a_task_file_is_refused_unless_it_is_trusted(data, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef text(_): return 'Ann'\n")
    (tmp_path / "own.yaml").write_text("task: own\ndataset_path: json\ndoc_to_text: !function own.text\n")
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: TaskManager(include_defaults=False))
    with pytest.raises(
        ConfigError, match="say --trust_task_code on the command line, or trust_task_code=True in Python"
    ):
        GeneralAbility(data, ["cola", str(tmp_path / "own.yaml")])
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ConfigError, match="cannot be loaded by lm-eval"):  # trusted, it is run, and has no data
        GeneralAbility(data, [str(tmp_path / "own.yaml")], trust_task_code=True)
    assert (tmp_path / "ran").exists()


def test_a_config_cannot_trust_a_task_file(tmp_path):
    callback = "{class_path: GeneralAbility, init_args: {tasks: [own.yaml], trust_task_code: true}}"
    (tmp_path / "run.yaml").write_text(f"{{model: {{layers: [1]}}, trainer: {{callbacks: [{callback}]}}}}")
    with pytest.raises(SystemExit):
        run_command(["fit", f"--config={tmp_path / 'run.yaml'}"])


def test_without_lm_eval_the_extra_is_named(data, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ConfigError, match=r"pip install 'cakeflow\[eval\]'"):
        GeneralAbility(data)


@pytest.mark.real
@pytest.mark.usefixtures("offline")
def test_the_real_model_tells_good_films_from_bad_ones(smollm2, tmp_path):
    films = ["a joy from start to end", "a tedious mess", "wonderful acting and a clever script", "a waste of time",
             "one of the best films of the year", "the worst film i have seen"]  # fmt: skip
    write(tmp_path, "sst2", [{"sentence": film, "label": (i + 1) % 2} for i, film in enumerate(films)])
    assert general_ability(smollm2, tmp_path, ["sst2"])["sst2/acc"] >= 5 / 6
