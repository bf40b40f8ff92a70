"""Shipped configs: every method with every model makes a module, without loading anything."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cakeflow_vision import ClassifierEdit, HeadRemoval, ProjectionEdit
from torchmetrics import Metric

from cakeflow import (
    Contexts,
    GradientSearch,
    LeastSquares,
    LocateThenEdit,
    NullSpace,
    OneHot,
    Scores,
    Sequential,
    Statistics,
    Uniform,
)  # fmt: skip
from cakeflow.allocators import Jacobian
from cakeflow.core.config import build_module, find_config, model_kind, shipped
from cakeflow.core.datamodule import EditDataModule
from cakeflow.errors import ConfigError
from cakeflow.metrics import Efficacy
from cakeflow.solvers import Descent
from cakeflow.targets import EssenceKL, LossBelow, NormDecay, SolvedAndNear, TargetLikelihood
from cakeflow.weighters import effective_layers
from cakeflow.weighters.scores import score_weights
from core.recipes import BESIDE, BODIES, IMAGES, OFFICIAL, OVER, PARTS, SEARCHES, SHARDS, STATISTICS, TARGETS

METHODS, MODELS = shipped("method"), shipped("model")


@pytest.fixture(autouse=True)
def nothing_loads(monkeypatch):
    """Loading a model from here is an error."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)


def build(method="alphaedit", model="smollm2-135m", **values):
    return build_module([METHODS[method], MODELS[model]], **values)


@pytest.mark.parametrize(("method", "model"), [*product([*PARTS, *OVER, *OFFICIAL], MODELS)])
def test_every_method_with_every_model(method, model):
    numbers = yaml.safe_load(MODELS[model].read_text())["model"]
    if method in OFFICIAL and len(numbers["layers"]) != (6 if method == "cake_official_gpt_j" else 5):
        with pytest.raises(ConfigError, match=r"scores for \d layers; give one for each, in order"):
            build(method, model)
        return
    module = build(method, model)
    assert isinstance(module, LocateThenEdit)
    assert not hasattr(module, "lm")
    assert module.layers == numbers["layers"]
    special = next((extra for part, extra in TARGETS.items() if part in method), {})
    assert module.targets == SEARCHES.get(method, GradientSearch)(**numbers["targets"], **special)
    assert module.statistics == Statistics(**numbers["statistics"], **STATISTICS.get(method, {}))


@pytest.mark.parametrize("method", PARTS)
def test_compositions(method):
    module = build(method)
    assert (module.weighter, module.allocator, module.solver, module.use_history) == PARTS[method]


@pytest.mark.parametrize(("method", "base"), OVER.items())
def test_cake_over_every_solver(method, base):
    module = build(method)
    assert isinstance(module.weighter, Scores)
    assert module.weighter.tau == 0.1
    _, allocator, *rest = PARTS[base]
    assert [module.solver, module.use_history] == rest
    assert module.allocator == (Jacobian() if method == "cake" else allocator)


@pytest.mark.parametrize("method", IMAGES)
def test_compositions_for_images(method):
    pictures = [np.full((2, 2, 3), value, np.uint8) for value in (1, 2)]
    module = build_module([METHODS[method]], base="somewhere", unrelated=pictures)
    assert isinstance(module, ClassifierEdit)
    assert (module.targets, module.solver, module.divergence) == IMAGES[method]
    assert (module.preserve, module.use_history) == (0.05 if method == "vit_gradient_ridge" else 0.1, True)
    assert not hasattr(module, "lm")


@pytest.mark.parametrize("method", BODIES)
def test_compositions_for_blocks_of_image_classifiers(method):
    pictures = [np.full((2, 2, 3), value, np.uint8) for value in (1, 2)]
    module = build_module([METHODS[method]], base="somewhere", unrelated=pictures)
    assert isinstance(module, HeadRemoval if method == "vit_heads_removed" else ProjectionEdit)
    assert {name: getattr(module, name) for name in BODIES[method]} == BODIES[method]
    assert not hasattr(module, "lm")


def test_every_recipe_is_pinned():
    others = {*BESIDE, *BODIES, *IMAGES}
    assert {*PARTS, *OVER, *OFFICIAL, *others} == set(METHODS)
    assert {name for name, path in METHODS.items() if model_kind(path) != "model"} == others


@pytest.mark.parametrize("method", BESIDE)
def test_memories_beside_the_weights(method):
    module = build_module([METHODS[method]], base="some/folder")
    assert {name: getattr(module, name) for name in BESIDE[method]} == BESIDE[method]
    assert module.name == "some/folder"


@pytest.mark.parametrize("method", SHARDS)
def test_side_memories_take_the_numbers_of_a_model(method):
    assert model_kind(METHODS[method]) == "model/SideMemory"
    numbers = yaml.safe_load(find_config("model/SideMemory", "smollm2-135m").read_text())["model"]
    module = build_module([METHODS[method], find_config("model/SideMemory", "smollm2-135m")])
    assert module.layer == numbers["layer"]
    assert (module.rule.lr, module.rule.steps) == (numbers["rule"]["lr"], numbers["rule"]["steps"])
    assert module.rule.decay_everywhere == (method == "wise_official")


def test_a_codebook_takes_the_numbers_of_a_model():
    module = build_module([METHODS["grace"], find_config(model_kind(METHODS["grace"]), "smollm2-135m")])
    assert (module.layer, module.codebook.eps) == (25, 5.0)


@pytest.mark.parametrize(
    ("method", "model", "n_eff"),
    [
        ("cake_official", "llama-3-8b", 4.851),
        ("cake_official", "smollm2-135m", 4.851),
        ("cake_official_gpt_j", "gpt-j-6b", 5.934),
        ("cake_official_gpt2_xl", "gpt2-xl", 4.996),
    ],
)
def test_constants_of_the_released_code(method, model, n_eff):
    module, (ridge, clamp, decay) = build(method, model), OFFICIAL[method]
    assert (module.allocator, module.solver, module.use_history) == (Sequential(), NullSpace(LeastSquares(ridge)), True)
    assert (module.targets.clamp, module.targets.decay) == (clamp, NormDecay(decay))
    weights = score_weights(module.weighter.score(None, None, module.layers))
    assert float(effective_layers(weights)) == pytest.approx(n_eff, abs=5e-4)


@pytest.mark.parametrize("model", MODELS)
def test_cake_has_a_score_for_every_layer_of_a_model_or_measures_all(model):
    module = build("cake", model)
    assert isinstance(module.weighter, Scores)
    assert module.weighter.tau == 0.1
    assert module.weighter.scores is None or set(module.layers) <= set(module.weighter.scores)


def test_setup_is_what_loads():
    with pytest.raises(ConfigError, match=r"'some/folder' .* that loads here: a model was loaded"):
        build(base="some/folder").setup()


@pytest.mark.parametrize("path", [*METHODS.values(), *MODELS.values()], ids=lambda path: path.stem)
def test_configs_are_short_and_safe(path):
    text = path.read_text(encoding="utf-8")
    assert path not in METHODS.values() or len(text.splitlines()) <= 15
    assert list(yaml.safe_load(text)) == ["model"]


@pytest.mark.parametrize("path", [*METHODS.values()], ids=lambda path: path.stem)
def test_methods_say_what_they_follow_and_where_they_depart(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "base" not in yaml.safe_load(text)["model"]


@pytest.mark.parametrize("path", [*shipped("data").values()], ids=lambda path: path.stem)
def test_data_configs(path):
    values = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
    assert len(EditDataModule(**values).requests) == values["limit"]


def test_shipped_lists_files_by_name():
    assert {"memit", "alphaedit", "cake"} <= set(METHODS)
    assert all(path.is_file() and path.stem == name for name, path in METHODS.items())
    assert shipped("nothing") == {}


def test_find_config_by_name_or_path(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {layers: [1]}")
    assert find_config("method", "memit") == METHODS["memit"]
    assert find_config("method", mine) == find_config("method", str(mine)) == mine


def test_a_short_search_changes_the_search_alone():
    path = find_config("targets", "short")
    for method in ("cake", "cake_pmet"):
        module = build_module([METHODS[method], MODELS["smollm2-135m"], path])
        plain = build_module([METHODS[method], MODELS["smollm2-135m"]])
        settings = {"steps": 11, "stride": 0.33, "betas": (0.8, 0.9), "stop": LossBelow(0.1)}
        assert module.targets == replace(plain.targets, **settings)


@pytest.mark.parametrize("kind", ["method", "model", "targets", "data"])
def test_unknown_name_lists_the_known(kind):
    with pytest.raises(ConfigError) as caught:
        find_config(kind, "memmit")
    assert "'memmit'" in str(caught.value)
    assert all(name in str(caught.value) for name in shipped(kind))


def test_values_given_in_python_win():
    contexts, weighter = Contexts.of(["{}", "a {}"]), OneHot(12)
    module = build(layers=[3, 12], history=False, contexts=contexts, weighter=weighter, seed=7)
    assert (module.layers, module.use_history, module.seed) == ([3, 12], False, 7)
    assert module.contexts is contexts
    assert module.weighter is weighter


TEXTS = [
    "0123456", "off", "1e3", "null", "~", "yes", "true", "3", "1_000", ".5", "0x1F", "12:30:45", "2024-01-01", "{a: 1}",
    "[1]", "# x", "a: b", "- a", "'q'", "&a x", "*a", "!!int 3", "<<", " x ", "", "\n",
]  # fmt: skip
"""Texts of which YAML would make something else, or nothing at all."""


def test_texts_given_in_python_arrive_as_they_are():
    options = {f"option{i}": text for i, text in enumerate(TEXTS)}
    options |= {"map": {text: text for text in TEXTS}, "list": [*TEXTS, {"deep": "off"}], "count": 3}
    module = build(base="0123456", dtype="1e3", model_kwargs=options, statistics={"source": TEXTS})
    assert (module.name, module.statistics.source) == ("0123456", TEXTS)
    assert {name: module._loading[name] for name in ("dtype", *options)} == {"dtype": "1e3", **options}


@pytest.mark.parametrize("text", ["off", "1e3", "[1]", "a: b"])
def test_a_source_given_in_python_is_its_name(text):
    assert build(statistics={"source": text}).statistics.source == text


def test_mappings_are_merged_into_the_configured_part():
    configured = yaml.safe_load(MODELS["smollm2-135m"].read_text())["model"]["targets"]
    assert build(targets={"clamp": 0.5}).targets == GradientSearch(**{**configured, "clamp": 0.5})


def written(folder, *texts):
    """Each text as the targets of a config file of its own."""
    for number, text in enumerate(texts):
        (folder / f"{number}.yaml").write_text(f"model: {{targets: {text}}}")
        yield folder / f"{number}.yaml"


def search(folder, *texts, **values):
    return build_module([METHODS["memit"], MODELS["gpt2-xl"], *written(folder, *texts)], **values).targets


PUBLISHED = GradientSearch(steps=20, lr=0.5)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["{likelihood: {solved_factor: 0.1}}", "{lr: 0.3}"], {"likelihood": TargetLikelihood(1.0, 0.1), "lr": 0.3}),
        (["{lr: 0.3, essence: {factor: 0.2}}", "{decay: {factor: 0.1}}", "{essence: {factor: 0.3}}"],
         {"lr": 0.3, "essence": EssenceKL(0.3), "decay": NormDecay(0.1)}),
        (["{essence: null}", "{steps: 3}"], {"essence": None, "steps": 3}),
        (["{decay: {class_path: EssenceKL, init_args: {factor: 0.2}}}", "{lr: 0.3}"],
         {"decay": EssenceKL(0.2), "lr": 0.3}),
        (["{further: [{class_path: NormDecay, init_args: {factor: 2.0}}, {class_path: EssenceKL}]}", "{lr: 0.3}"],
         {"further": (NormDecay(2.0), EssenceKL()), "lr": 0.3}),
        (["{stop: {class_path: SolvedAndNear, init_args: {inner: {loss: 0.2}}}}", "{stop: {kl: 0.7}}"],
         {"stop": SolvedAndNear(0.7, LossBelow(0.2))}),
        (["{class_path: GradientSearch, init_args: {site: mlp_out}}", "{lr: 0.3}"], {"site": "mlp_out", "lr": 0.3}),
    ],
)  # fmt: skip
def test_targets_of_several_files_merge_field_by_field(tmp_path, texts, expected):
    assert search(tmp_path, *texts) == replace(PUBLISHED, **expected)


def test_targets_of_python_merge_into_those_of_files(tmp_path):
    overrides = {"essence": {"factor": 0.3}, "decay": None}
    assert search(tmp_path, "{lr: 0.3}", targets=overrides) == replace(
        PUBLISHED, lr=0.3, essence=EssenceKL(0.3), decay=None
    )
    assert search(tmp_path, "{lr: 0.3}", targets=GradientSearch(steps=1)) == GradientSearch(steps=1)


def test_parts_by_class_name():
    module = build(weighter={"class_path": "OneHot", "init_args": {"layer": 7}}, solver={"class_path": "LeastSquares"})
    assert module.weighter == OneHot(7)
    assert isinstance(module.solver, LeastSquares)


def test_null_in_a_part_is_a_value_like_others():
    module = build("ft", solver={"class_path": "Descent", "init_args": {"bound": None, "steps": 3}})
    assert module.solver == Descent(steps=3, bound=None)


def test_later_files_win(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {layers: [2, 4], solver: {class_path: LeastSquares, init_args: {ridge: 3.0}}}")
    module = build_module([METHODS["alphaedit"], MODELS["smollm2-135m"], mine])
    assert (module.layers, module.solver) == ([2, 4], LeastSquares(3.0))
    assert module.weighter == Uniform()


@pytest.mark.parametrize(
    "values",
    [
        {"layer": [1, 2]},
        {"layer": (1, 2)},
        {"contexst": Contexts()},
        {"targets": {"stepz": 3}},
        {"targets": {"steps": "many"}},
        {"targets": {"steps": 0}},
        {"targets": {"likelihood": None}},
        {"targets": {"further": [{"class_path": "LossBelow"}]}},
        {"statistics": {"tokens": -1}},
        {"layers": "all"},
        {"layers": [3, 2]},
        {"layers": [2, 2]},
        {"layers": [-1, 2]},
        {"layers": []},
        {"weighter": {"class_path": "Unifrom"}},
        {"weighter": {"class_path": "LeastSquares"}},
        {"weighter": {"class_path": "Scores", "init_args": {"scores": {1: 1.0}, "tau": 0}}},
        {"allocator": {"class_path": "Sequential", "init_args": {"power": 2.0}}},
        {"allocator": {"class_path": "Sequential", "init_args": {"residual_at": "middle"}}},
        {"solver": {"class_path": "LeastSquares", "init_args": {"ridge": -1.0}}},
        {"solver": {"class_path": "NullSpace", "init_args": {"threshold": 0.0}}},
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(values):
    ((name, value),) = values.items()
    with pytest.raises(ConfigError) as caught:
        build(**values)
    inner = value if isinstance(value, dict) else {}
    assert any(word in str(caught.value) for word in (name, *inner, *inner.get("init_args", {})))


def test_a_value_that_an_optional_part_refuses_is_an_error_of_ours():
    with pytest.raises(ConfigError, match=r"EssenceKL: factor must be 0 or more, got -1\.0"):
        build(targets={"essence": {"factor": -1.0}})


@pytest.mark.parametrize("text", ["model: {layerz: [1]}", "modle: {layers: [1]}", "model: [", "- 1"])
def test_broken_files_are_refused_by_name(text, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        build_module([mine])


def test_configs_hold_no_paths():
    for path in [*METHODS.values(), *MODELS.values()]:
        assert str(Path.home()) not in path.read_text()


class Margin(Metric):
    """A user's metric."""

    full_state_update = False

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, expected, rival, correct, record, kind):
        self.total += self.scale * (expected - rival).nansum()

    def compute(self):
        return self.total


def test_further_metrics_by_name_or_as_objects():
    named = build(metrics=[{"class_path": f"{__name__}.Margin", "init_args": {"scale": 2.0}}])
    assert named.metrics["margin"].scale == 2.0
    assert build(metrics=[Margin()]).metrics["margin"].scale == 1.0
    assert set(build().metrics) == set(named.metrics) - {"margin"}
    with pytest.raises(ConfigError, match="there is a metric 'efficacy' already"):
        build(metrics=[Efficacy()])


def test_a_config_names_a_judge_and_a_protocol_of_free_answers(tmp_path):
    path = tmp_path / "judged.yaml"
    path.write_text(
        "model: {end_of_text: true, evaluation: {protocol: wild, judge: {class_path: Containment}}}", encoding="utf-8"
    )
    module = build_module([METHODS["memit"], MODELS["smollm2-135m"], path])
    assert (module.evaluation.id, module.end_of_text) == ("wild-v1+answers32v2+Containment", True)
