"""Suites as data: what is in the shipped ones, and what is refused before a model is loaded."""

import json
import re

import pytest
from tiny_suites import SUITE, facts

from cakeflow.core.config import read_config, shipped
from cakeflow.data import builtin_facts
from cakeflow.errors import ConfigError, RequestError
from cakeflow.suites import Suite, arms_of, read_suite
from cakeflow.suites.suite import by_cell


def test_the_small_suite_has_every_recipe_of_language_models():
    suite = read_suite("small")
    recipes = {part.get("method", name) for name, part in suite.methods.items()}
    assert recipes == {name for name in shipped("method") if not name.startswith("vit_")}
    assert max(suite.sizes) * len(suite.seeds) >= 20  # fewer records have no bootstrap


@pytest.mark.parametrize("name", shipped("suite"))
def test_shipped_suites_can_be_run(name):
    suite = read_suite(name)
    arms = arms_of(suite)
    assert len(arms) == len(suite.methods) * len(suite.data) * len(suite.sizes) * len(suite.seeds)
    assert arms[0].method == suite.baseline
    assert len({arm.name for arm in arms}) == len(arms)


def test_an_arm_is_a_method_on_facts_of_a_seed(write):
    suite = read_suite(write(seeds=[0, 3], sizes=[2, 4]))
    arms = arms_of(suite)
    assert [(data, size, [*methods]) for data, size, methods in by_cell(arms)] == [
        ("own", 2, ["memit_seq", "ultraedit", "single"]), ("own", 4, ["memit_seq", "ultraedit", "single"])
    ]  # fmt: skip
    first, other = (next(arm for arm in arms if (arm.size, arm.seed) == (4, seed)) for seed in (0, 3))
    assert first.name == "own/4/seed0/memit_seq"
    assert [each.subject for each in first.requests.requests] != [each.subject for each in other.requests.requests]
    single = next(arm for arm in arms if arm.method == "single")
    assert (single.batch_size, first.batch_size) == (1, 2)
    assert single.module().evaluation.protocol == "wild"
    assert single.module().targets.steps == 3


def test_facts_in_an_order_of_their_own_are_measured_once(write):
    data = {"own": {"source": "facts.json"}, "ordered": {"source": "facts.json", "shuffle_seed": None}}
    arms = arms_of(read_suite(write(data=data, seeds=[0, 1, 0], sizes=[2, 2])))
    assert [(arm.data, arm.seed) for arm in arms if arm.method == "single"] == [("own", 0), ("own", 1), ("ordered", 0)]


def test_an_arm_names_a_shipped_search_as_a_command_does(write):
    methods = {"memit_seq": {}, "short": {"method": "memit_seq", "targets": "short"}}
    plain, short = arms_of(read_suite(write(methods=methods)))
    search = read_config(shipped("targets")["short"])["model"]["targets"]
    assert short.module().targets.stride == search["stride"] != plain.module().targets.stride
    assert read_config(shipped("targets")["short"]) in short.parts
    with pytest.raises(ConfigError, match="no targets config 'shrot'; did you mean 'short'"):
        arms_of(read_suite(write(methods={"memit_seq": {"targets": "shrot"}})))


def test_a_data_set_may_have_its_own_order_and_callbacks(write):
    own = {"source": "facts.json", "shuffle_seed": None, "callbacks": [{"class_path": "NeighborShift"}]}
    arm = arms_of(read_suite(write(data={"own": own})))[0]
    assert [each.subject for each in arm.requests.requests] == ["Ann", "Bob", "Rome", "Oslo"]
    assert {type(each).__name__ for each in arm.callbacks()} == {"KnowledgeCheck", "NeighborShift", "OutcomeCheck"}


def test_parts_are_replaced_from_the_command(write, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps(facts(2)))
    path = write(shape={"model_type": "gpt2"})
    suite = read_suite(path, model="else", data=["other.json"], methods=["single"], sizes=[2])
    assert (suite.model, suite.config, suite.shape) == ("else", None, {})
    assert suite.data["other"] == {"source": "other.json"}
    assert [*suite.methods] == ["memit_seq", "single"]
    assert suite.sizes == [2]
    assert read_suite(path, model="else", config="numbers.yaml").config == "numbers.yaml"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"baseline": "memitseq"}, "no arm 'memitseq'; did you mean 'memit_seq'?"),
        ({"methods": {"memit_seq": {}, "memitt": {}}}, "no method config 'memitt'; did you mean 'memit'?"),
        ({"methods": {"memit_seq": {"rigde": 1}}}, "arm 'memit_seq' of the suite: .*rigde"),
        ({"methods": {"memit_seq": {"layers": [7, 3]}}}, "arm 'memit_seq' of the suite: .*layers"),
        ({"methods": {"memit_seq": {"base": "gpt2"}}}, "arm 'memit_seq': base is that of the whole suite"),
        ({"config": None}, "arm 'memit_seq' of the suite: no shipped model config for this model"),
        ({"data": {"own": {"source": "nothing.json"}}}, "nothing.json"),
        ({"data": {"own": {"sourse": "builtin"}}}, "data set 'own' of the suite: .*sourse"),
        ({"sizes": [9]}, "data set 'own' has 8 facts that can be edited together, and 9 are to be"),
        ({"sizes": [0]}, "sizes must be a whole number of at least 1, got 0"),
        ({"metrics": ["efficacy", "eficacy"]}, "nothing measures 'eficacy'; did you mean 'efficacy'?"),
        ({"metrics": ["neighbors/kl"]}, "nothing measures 'neighbors/kl'"),
        ({"metrics": ["efficacy_judged"], "evaluation": {}}, "nothing measures 'efficacy_judged'"),
        ({"callbacks": [{"class_path": "KnowlegeCheck"}]}, "callbacks: .*KnowlegeCheck"),
        (
            {"callbacks": [{"class_path": "KnowledgeCheck", "init_args": {"limit": 0}}]},
            "limit must be a whole number of at least 1",
        ),
        ({"evaluation": {"protocol": "tame"}}, "arm 'memit_seq' of the suite: .*tame"),
        ({"methods": {}}, "mine.yaml, methods"),
        ({"seeds": [-1]}, "mine.yaml, seeds.0 = -1"),
        ({"sizze": [1]}, "mine.yaml, sizze"),
    ],
)
def test_bad_suites_are_refused(write, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        arms_of(read_suite(write(**changes)))


@pytest.mark.parametrize(
    ("metric", "field"),
    [
        ("efficacy", "target_true"), ("knowledge/new", "target_true"), ("generalization_answer", "paraphrase"),
        ("specificity_answer", "neighborhood"),
    ],
)  # fmt: skip
def test_facts_without_a_field_that_a_metric_needs_are_refused(write, tmp_path, metric, field):
    bare = [{name: each for name, each in fact.items() if name != field} for fact in facts()]
    bare = [{**fact, "probes": [each for each in fact["probes"] if each["kind"] != field]} for fact in bare]
    (tmp_path / "facts.json").write_text(json.dumps(bare))
    reason = f"data set 'own': no record can feed {metric}: {field} is missing in 4 of 4"
    with pytest.raises(ConfigError, match=reason):
        arms_of(read_suite(write(metrics=[metric])))


def test_bad_facts_are_refused_before_anything_is_measured(write, tmp_path):
    (tmp_path / "facts.json").write_text(json.dumps([*facts(3), {"prompt": "{} is", "subject": "Ann"}]))
    with pytest.raises(RequestError, match="entry 3, target_new"):
        arms_of(read_suite(write()))


def test_unknown_suites_and_unclear_files_are_refused(write):
    with pytest.raises(ConfigError, match="no suite config 'smal'; did you mean 'small'"):
        read_suite("smal")
    with pytest.raises(ConfigError, match="names are not distinct: own, own"):
        read_suite(write(), data=["own.json"])
    with pytest.raises(ConfigError, match="suite mine has no arm 'nothing'"):
        read_suite(write(), methods=["nothing"])


def test_arms_have_folders_that_every_system_can_make(write):
    own = {"source": "facts.json"}
    arms = arms_of(read_suite(write(data={"../up?": own, "CON": own})))
    assert {arm.name.split("/")[0] for arm in arms} == {".._up_", "CON_"}
    for names in (("Own", "own"), ("a:b", "a?b")):
        with pytest.raises(ConfigError, match="would have one folder on some systems"):
            arms_of(read_suite(write(data=dict.fromkeys(names, own))))


def test_tasks_of_a_folder_become_columns(write, tmp_path):
    item = '{"prompt": "The sea is", "choices": ["blue", "loud"], "answer": 0}\n'
    for name in ("words", "facts"):
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks" / f"{name}.jsonl").write_text(item)
    suite = read_suite(write(), ability=str(tmp_path / "tasks"))
    assert suite.metrics[-2:] == ["ability/facts/acc", "ability/words/acc"]
    assert type(arms_of(suite)[0].callbacks()[2]).__name__ == "ChoiceAbility"
    with pytest.raises(ConfigError, match=r"--ability .*: no task there; give a folder"):
        read_suite(write(), ability=str(tmp_path / "none"))


def test_a_suite_is_what_its_class_says():
    assert set(SUITE) <= set(Suite.model_fields)
    assert re.match(r"[a-z_]+$", "".join(Suite.model_fields))
    assert len(builtin_facts()) >= read_suite("small").sizes[0]
