"""The recipes give the official code's numbers, and the benchmark that says so fails where they do not."""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ARCHITECTURES, GOLDEN
from safetensors.torch import load_file, save_file

from cakeflow import read_requests
from cakeflow.data import builtin_facts
from cakeflow.evaluation.scoring import score_records
from cakeflow.metrics import KINDS
from cakeflow.metrics.text import fluency
from cakeflow.models.loading import load_model

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "parity.py"
BARS = {"gpt2": (1e-10, 1e-6), "llama": (1e-5, 1e-4)}
RECORDINGS = [
    ("memit", "memit"),
    ("memit_seq", "memit_seq"),
    ("memit_blue", "memit_blue"),
    ("alphaedit", "alphaedit"),
    ("alphaedit", "alphaedit_seq"),
    ("alphaedit_blue", "alphaedit_blue"),
    ("cake_paper", "alphaedit_seq"),
    ("rect", "rect"),
    ("pmet", "pmet"),
    ("pmet_seq", "pmet_seq"),
    ("rome_official", "rome"),
]


@pytest.fixture(scope="module")
def parity():
    sys.path.insert(0, str(SCRIPT.parent))  # as when it is run
    spec = importlib.util.spec_from_file_location("parity", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["parity"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))
    del sys.modules["parity"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("recipe", "recording"), RECORDINGS)
def test_recipes_give_the_official_numbers(parity, golden, arch, recipe, recording):
    recorded = parity.Golden.read(golden / "tiny" / f"{arch}_golden.json")
    worst = parity.compare(recorded, recipe, recording, read_requests(golden / "requests.json"))
    z_bar, delta_bar = BARS[arch]
    assert worst["z"] <= z_bar
    assert worst["z_later"] <= (z_bar if recording.startswith("alphaedit") else delta_bar)
    assert worst["delta"] <= delta_bar


def test_the_bars_of_the_script_are_these(parity):
    assert parity.BARS == BARS
    compared = {(recipe, name) for recipe, names in parity.RECORDINGS.items() for name in names}
    assert set(RECORDINGS) <= compared


def spoil_nothing(_tensors):
    pass


def spoil_delta(tensors):
    tensors["memit/delta/3"] *= 1 + 1e-5


def spoil_z(tensors):
    tensors["memit/z/4"][7, 3] += 1e-6


def spoil_shape(tensors):
    tensors["memit/delta/3"] = tensors["memit/delta/3"].T.contiguous()


def spoil_nan(tensors):
    tensors["memit/delta/3"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "status"),
    [(spoil_nothing, 0), (spoil_delta, 1), (spoil_z, 1), (spoil_shape, 1), (spoil_nan, 1)],
)
def test_main_exits_1_where_numbers_differ(parity, golden, tmp_path, monkeypatch, capsys, spoil, status):
    """One architecture, one recording, changed by little more than the bar."""
    folder = tmp_path / "golden"
    for name in ("gpt2", "tokenizer"):
        shutil.copytree(golden / "tiny" / name, folder / "tiny" / name)
    shutil.copy(golden / "requests.json", folder)
    info = json.loads((golden / "tiny" / "gpt2_golden.json").read_text())
    info = {name: value for name, value in info.items() if name in ("_setup", "memit")}
    (folder / "tiny" / "gpt2_golden.json").write_text(json.dumps(info))
    tensors = load_file(golden / "tiny" / "gpt2_golden.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "tiny" / "gpt2_golden.safetensors")
    monkeypatch.setattr(sys, "argv", ["parity.py", "--golden", str(folder), "--json", str(tmp_path / "figures.json")])
    assert parity.main() == status
    assert ("ABOVE THE BAR" in capsys.readouterr().out) is bool(status)
    assert set(json.loads((tmp_path / "figures.json").read_text())) == {"gpt2/memit/memit"}


def test_main_exits_1_where_nothing_was_compared(parity, golden, tmp_path, monkeypatch):
    shutil.copy(golden / "requests.json", tmp_path)
    (tmp_path / "tiny").mkdir()
    monkeypatch.setattr(sys, "argv", ["parity.py", "--golden", str(tmp_path)])
    assert parity.main() == 1


PLUS_FIGURES = {
    "one_batch": {"rank_unequal", "tried_unequal", "objective", "candidates", "solved"},
    "three_batches": {"rank_unequal", "tried_unequal", "objective", "candidates", "solved", "history_weights"},
    "everything_accepted": {"rank_unequal"},
    "nothing_accepted": {"rank_unequal"},
}


@pytest.fixture
def parity_plus(parity):
    yield importlib.import_module("parity_alphaedit_plus")
    del sys.modules["parity_alphaedit_plus"]  # its names of ``parity`` end with that fixture


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", PLUS_FIGURES)
def test_alphaedit_plus_gives_the_official_numbers(parity_plus, golden, arch, name):
    (run,) = [
        run for run in parity_plus.runs(golden / "alphaedit_plus", golden) if (run.arch, run.name) == (arch, name)
    ]
    z_bar, delta_bar = BARS[arch]
    edited = parity_plus.edited(run)
    assert edited["rank_unequal"] == 0
    assert edited["z"] <= z_bar
    assert edited["z_later"] <= (delta_bar if name == "three_batches" else z_bar)
    assert edited["delta"] <= delta_bar
    solved = parity_plus.solved(run)
    assert set(solved) | {"rank_unequal"} == PLUS_FIGURES[name]
    assert all(value == 0 if name.endswith("unequal") else value <= 1e-7 for name, value in solved.items())
    assert max(solved.get("objective", 0), solved.get("history_weights", 0)) <= 1e-13


def spoil_rank(info, _tensors):
    info["one_batch"]["steps"][1]["rank"] += 1


def spoil_objective(info, _tensors):
    info["one_batch"]["steps"][2]["objective"][1] *= 1 + 1e-6


def spoil_candidates(_info, tensors):
    tensors["one_batch/candidates_times_probe/0/1"][3] *= 1 + 1e-5


@pytest.mark.parametrize("spoil", [None, spoil_rank, spoil_objective, spoil_candidates])
def test_main_exits_1_where_a_further_method_differs(parity, parity_plus, golden, tmp_path, monkeypatch, capsys, spoil):
    folder = tmp_path / "golden"
    for name in ("gpt2", "tokenizer"):
        shutil.copytree(golden / "tiny" / name, folder / "tiny" / name)
    shutil.copy(golden / "requests.json", folder)
    (folder / "alphaedit_plus").mkdir()
    info = json.loads((golden / "alphaedit_plus" / "gpt2_golden.json").read_text())
    info = {name: info[name] for name in ("_setup", "one_batch")}
    tensors = load_file(golden / "alphaedit_plus" / "gpt2_golden.safetensors")
    if spoil:
        spoil(info, tensors)
    (folder / "alphaedit_plus" / "gpt2_golden.json").write_text(json.dumps(info))
    save_file(tensors, folder / "alphaedit_plus" / "gpt2_golden.safetensors")
    # no recordings of the first kind, but the second moments that are beside them
    shutil.copy(golden / "tiny" / "gpt2_golden.safetensors", folder / "tiny")
    (folder / "tiny" / "gpt2_golden.json").write_text(
        json.dumps({"_setup": json.loads((golden / "tiny" / "gpt2_golden.json").read_text())["_setup"]})
    )
    monkeypatch.setattr(sys, "argv", ["parity.py", "--golden", str(folder), "--json", str(tmp_path / "figures.json")])
    assert parity.main() == bool(spoil)
    assert ("ABOVE THE BAR" in capsys.readouterr().out) is bool(spoil)
    assert set(json.loads((tmp_path / "figures.json").read_text())) == {"gpt2/alphaedit_plus/one_batch"}


# ---- HSE ----


@pytest.fixture
def hse(parity):
    yield importlib.import_module("parity_hse")
    del sys.modules["parity_hse"]


def test_hse_gives_the_official_numbers(hse, golden, capsys):
    """Facts one after the other, three batches of them and six, on both architectures."""
    figures, failed = hse.compare(GOLDEN / "hse", golden)
    assert not failed
    assert hse.BARS == {"gpt2": (1e-10, 1e-6, 1e-2), "llama": (1e-5, 1e-4, 1e-5)}
    runs = [f"{arch}/hse_official/{run}" for arch in ARCHITECTURES for run in ("one_by_one_unspaced", "three_batches")]
    assert sorted(figures) == sorted(runs)
    for name, worst in figures.items():
        z_bar, delta_bar = BARS[name.split("/")[0]]
        assert worst["steps"] == worst["factor"] == 0
        assert max(worst["z"], worst["fisher"]) <= z_bar
        assert max(worst["delta"], worst.get("total", 0.0)) <= delta_bar
        assert ("total" in worst) is name.endswith("unspaced")  # the other one has every batch's change
    assert "ABOVE" not in capsys.readouterr().out


def nothing(_info, _tensors):
    pass


def z(_info, tensors):
    tensors["three_batches/z/0"][2, 3] += 1e-7


def importance(_info, tensors):
    tensors["three_batches/fisher/0/3"] *= 1 + 1e-8


def delta(_info, tensors):
    tensors["three_batches/delta/0/2"] *= 1 + 1e-5


def no_delta(_info, tensors):
    del tensors["three_batches/delta/0/2"]


def factor(info, _tensors):
    info["factors"][0] = 2.0


def updates(info, _tensors):
    info["updates"][0][1] -= 1


def forgetting(info, _tensors):
    info["hyperparameters"]["forget_factor"] = 0.21


@pytest.mark.parametrize("spoil", [nothing, z, importance, delta, no_delta, factor, updates, forgetting])
def test_main_exits_1_where_hse_differs(hse, parity, golden, tmp_path, monkeypatch, capsys, spoil):
    """The first batch of one run, changed by little more than the bar."""
    folder = tmp_path / "golden"
    shutil.copytree(golden, folder)
    (folder / "hse").mkdir()
    info = json.loads((GOLDEN / "hse" / "gpt2_golden.json").read_text())
    run = {name: each[:1] if isinstance(each, list) else each for name, each in info["three_batches"].items()}
    tensors = load_file(GOLDEN / "hse" / "gpt2_golden.safetensors")
    spoil(run, tensors)
    (folder / "hse" / "gpt2_golden.json").write_text(json.dumps({"_setup": info["_setup"], "three_batches": run}))
    save_file(tensors, folder / "hse" / "gpt2_golden.safetensors")
    monkeypatch.setattr(parity, "RECORDINGS", {})
    monkeypatch.setattr(parity, "FURTHER", ("hse",))
    monkeypatch.setattr(sys, "argv", ["parity.py", "--golden", str(folder)])
    assert parity.main() == int(spoil is not nothing)
    assert ("ABOVE THE BAR" in capsys.readouterr().out) is (spoil is not nothing)


def recorded_evaluation(lm, records, folder):
    """What the official code would have recorded of a tiny model, by plain passes; CounterFact, zsRE and a text."""
    scores = score_records(lm, records, "official")
    cases = []
    for index, record in enumerate(records):
        case = {"case_id": record.case_id}
        for number, kind in enumerate(KINDS):
            chosen = (scores.record == index) & (scores.kind == number)
            sides = (("target_new", "target_true"), ("target_true", "target_new"))[number == 2]
            pairs = zip(scores.expected[chosen].tolist(), scores.rival[chosen].tolist(), strict=True)
            case[f"{kind}_prompts_probs"] = [{sides[0]: -reference, sides[1]: -rival} for reference, rival in pairs]
            case[f"{kind}_prompts_correct"] = scores.correct[chosen].tolist()
        cases.append(case)
    texts = {"texts": ["a b a b", "a b c d"], "ngram_entropy": (fluency("a b a b") + fluency("a b c d")) / 2}
    path = folder / "recording.json"
    path.write_text(json.dumps({"counterfact": cases, "fluency": [texts]}))
    (folder / "records.json").write_text(json.dumps([record.to_dict() for record in records]))
    return path


@pytest.mark.parametrize("spoil", ["nothing", "nll", "flag", "entropy"])
def test_the_evaluation_exits_1_where_numbers_differ(parity, lm, tmp_path, monkeypatch, capsys, spoil):
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    records = [replace(record, case_id=number) for number, record in enumerate(builtin_facts()[:3])]
    path = recorded_evaluation(load_model(tmp_path / "model"), records, tmp_path)
    recording = json.loads(path.read_text())
    if spoil == "nll":
        recording["counterfact"][1]["paraphrase_prompts_probs"][0]["target_new"] += 2e-4
    elif spoil == "flag":
        recording["counterfact"][2]["neighborhood_prompts_correct"][0] ^= True
    elif spoil == "entropy":
        recording["fluency"][0]["ngram_entropy"] += 1e-6
    path.write_text(json.dumps(recording))
    words = ["--evaluation", path, "--counterfact", tmp_path / "records.json", "--model", tmp_path / "model"]
    monkeypatch.setattr(sys, "argv", ["parity.py", *map(str, words)])
    assert parity.main() == int(spoil != "nothing")
    assert "counterfact" in capsys.readouterr().out


def test_an_evaluation_with_nothing_to_compare_exits_1(parity, lm, tmp_path, monkeypatch):
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "recording.json").write_text("{}")
    words = ["--evaluation", str(tmp_path / "recording.json"), "--model", str(tmp_path / "model")]
    monkeypatch.setattr(sys, "argv", ["parity.py", *words])
    assert parity.main() == 1


# ---- side memories ----


@pytest.fixture
def memory(parity):
    yield importlib.import_module("parity_memory")
    for name in ("parity_memory", "parity_memory_a3e", "parity_memory_wise"):
        sys.modules.pop(name, None)


def test_side_memories_give_the_official_numbers(memory, golden, capsys):
    figures, failed = memory.compare(GOLDEN / "memory", golden)
    assert not failed
    parts = {"edits", "states", "composed", "composed_anew", "paper_rule"}
    assert {f"llama/a3e/{part}" for part in parts} <= set(figures)
    assert figures["llama/wise/retrieve"]["change"] <= 1e-12
    assert {"loss", "margin", "threshold", "joined", "routes_unequal", "logits"} <= set(figures["llama/wise/retrieve"])
    assert set(figures["llama/wise/functions"]) == {"joins", "distances"}
    assert max(figures["llama/a3e/edits"][name] for name in ("direction", "output")) <= 1e-5
    unequal = [value for each in figures.values() for name, value in each.items() if name.endswith("unequal")]
    assert len(unequal) >= 10
    assert set(unequal) == {0}
    assert "ABOVE" not in capsys.readouterr().out


def a3e_loss(info, _tensors):
    info["edits"][2]["steps"][30]["others"] += 2e-5


def a3e_output(_info, tensors):
    tensors["edit/3/B"][tensors["edit/3/B"].abs().argmax()] *= 1 + 1e-3


def a3e_neuron(_info, tensors):
    tensors["edit/1/kept"][5] ^= 1


def a3e_retrieval(info, _tensors):
    info["composed"][2]["retrieved"] = [0]


def a3e_text(info, _tensors):
    info["composed"][4]["generated"][-1] += 1


def a3e_similarity(_info, tensors):
    tensors["composed/search1/cos_answer"] *= 1 + 1e-6


def a3e_sum(_info, tensors):
    tensors["paper_rule/three/sum"][0] += 1


def wise_loss(info, _tensors):
    info["retrieve"]["edits"][2]["steps"][5]["ft"][0] += 1e-6


def wise_weight(_info, tensors):
    tensors["retrieve/side/4"] *= 1 + 1e-6


def wise_route(info, _tensors):
    info["retrieve"]["routing"][0]["chosen"] = "main"


A3E = [nothing, a3e_loss, a3e_output, a3e_neuron, a3e_retrieval, a3e_text, a3e_similarity, a3e_sum]
WISE = [nothing, wise_loss, wise_weight, wise_route]


@pytest.mark.parametrize(("method", "spoil"), [*(("a3e", part) for part in A3E), *(("wise", part) for part in WISE)])
def test_main_exits_1_where_a_side_memory_differs(memory, parity, golden, tmp_path, monkeypatch, capsys, method, spoil):
    folder = tmp_path / "golden"
    shutil.copytree(golden, folder)
    (folder / "memory").mkdir()
    info = json.loads((GOLDEN / "memory" / f"{method}_llama.json").read_text())
    tensors = load_file(GOLDEN / "memory" / f"{method}_llama.safetensors")
    spoil(info, tensors)
    (folder / "memory" / f"{method}_llama.json").write_text(json.dumps(info))
    save_file(tensors, folder / "memory" / f"{method}_llama.safetensors")
    monkeypatch.setattr(parity, "RECORDINGS", {})
    monkeypatch.setattr(parity, "FURTHER", ("memory",))
    monkeypatch.setattr(sys, "argv", ["parity.py", "--golden", str(folder)])
    assert parity.main() == int(spoil is not nothing)
    out = capsys.readouterr().out
    assert method in out
    assert ("ABOVE THE BAR" in out) is (spoil is not nothing)
