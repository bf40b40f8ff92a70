"""The identity of a run: everything that decides its weights is on record, and it goes on with nothing else."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from tiny_runs import LAYERS, StopAfter, content, editor_of

from cakeflow import Contexts, LeastSquares, Statistics, Uniform
from cakeflow.callbacks import Policy, PolicyGuard
from cakeflow.core import identity
from cakeflow.core.identity import inputs_of
from cakeflow.errors import ResumeError
from cakeflow.journal import provenance
from cakeflow.journal.ledger import bodies, read_entries
from cakeflow.journal.schema import BatchBody
from cakeflow.models import Site, has_fast_products
from cakeflow.solvers import Solver
from cakeflow.storage.cache import content_key


def run_of(lm, requests, folder, *callbacks, **settings):
    """Six edits in batches of two, without evaluation."""
    editor = editor_of(lm, {"callbacks": list(callbacks)}, **settings)
    return editor.fit(requests[:6], 2, run_dir=folder / "run", evaluate=False)


def other_threads(lm, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)


def other_attention(lm, monkeypatch):
    lm.model.set_attn_implementation("eager")


def other_products(lm, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")


def other_library(lm, monkeypatch):
    monkeypatch.setattr(identity, "has_fast_products", lambda: not has_fast_products())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_threads, r"arithmetic\.threads was \d+, is 99"),
        (other_attention, r"arithmetic\.attention was sdpa, is eager"),
        (other_products, r"arithmetic\.products was highest(, oneDNN)?, is medium"),
        (other_library, r"arithmetic\.products was (highest, is highest, oneDNN|highest, oneDNN, is highest)"),
    ],
)
def test_another_arithmetic_is_refused(lm, requests, tmp_path, monkeypatch, change, words):
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run_of(copy.deepcopy(lm), requests, tmp_path, StopAfter(1))
    change(lm, monkeypatch)
    with pytest.raises(ResumeError, match=words):
        run_of(lm, requests, tmp_path)


def test_other_versions_are_said(lm, requests, tmp_path, monkeypatch):
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run_of(copy.deepcopy(lm), requests, tmp_path, StopAfter(1))
    monkeypatch.setattr(provenance, "version", lambda name: "99")
    with pytest.warns(UserWarning, match="run of other versions: cakeflow was .*, is 99; torch was"):
        run_of(lm, requests, tmp_path)


SENTENCE = "the sea was calm and every small boat came home before night while the old town slept under rain"
WORDS = SENTENCE.split()


def text_of(step):
    return " ".join(WORDS[(step * i + i * i // 3) % len(WORDS)] for i in range(900))


def other_corpus(folder, changes):
    (folder / "corpus.txt").write_text(text_of(7))


def other_moments(folder, changes):
    changes["moments"] = {layer: 2 * moment for layer, moment in changes["moments"].items()}


def other_policy(folder, changes):
    changes["policy"] = Policy(max_edits=100)


@dataclass(frozen=True)
class Scaled(Solver):
    """A solver with many numbers, of which its text shows a few only."""

    scale: torch.Tensor

    def solve(self, problem):
        update = LeastSquares(0.5).solve(problem)
        return replace(update, right=update.right * self.scale[0])


def other_tensor(folder, changes):
    changes["solver"] = Scaled(changes["solver"].scale.clone().index_fill_(0, torch.tensor(1000), 2.0))


@pytest.mark.parametrize(
    ("names", "change", "words"),
    [
        (["statistics"], other_corpus, "basis/1 was .*; corpus was [0-9a-f]{64}, is [0-9a-f]{64}; moment/1 was"),
        (["moments"], other_moments, "moment/1 was [0-9a-f]{64}, is [0-9a-f]{64}; moment/3 was"),
        (
            ["moments", "policy"],
            other_policy,
            "under the policy with the hash [0-9a-f]{16}, which has not judged it",
        ),
        (["moments", "solver"], other_tensor, r"settings.solver was .*; [0-9a-f]{20,}..., is .*; [0-9a-f]{20,}...;"),
    ],
    ids=["corpus", "moments", "policy", "tensor"],
)
def test_a_run_goes_on_with_what_its_batches_were_solved_with(lm, requests, tmp_path, cache, names, change, words):
    (tmp_path / "corpus.txt").write_text(text_of(5))
    width = lm.key_width(Site(1, "mlp_out"))
    parts = {
        "statistics": Statistics(tmp_path / "corpus.txt", tokens=800, window=32, null_threshold=0.5),
        "moments": dict.fromkeys(LAYERS, torch.eye(width).double()),
        "policy": Policy(max_edits=99),
        "solver": Scaled(torch.ones(2000).double()),
    }
    changes = {name: parts[name] for name in names}

    def run(lm, *callbacks, policy=None, **settings):
        guards = [PolicyGuard(policy)] if policy else []
        settings = {"moments": None, "solver": LeastSquares(0.5), **settings}
        return run_of(lm, requests, tmp_path, *guards, *callbacks, **settings)

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(copy.deepcopy(lm), StopAfter(2), **changes)
    body = bodies(read_entries(tmp_path / "run/journal/ledger.jsonl"), BatchBody)[0]
    hashed = {"contexts", "weighter", "moment/1", "moment/3"}
    collected = {"corpus", "basis/1", "basis/3"} if "statistics" in names else set()
    assert set(body.inputs) == hashed | {*names} & {"policy"} | collected
    change(tmp_path, changes)
    files = content(tmp_path / "run/journal")
    with pytest.raises(ResumeError, match=words):
        run(lm, **changes)
    assert content(tmp_path / "run/journal") == files


def test_texts_are_left_out_after_a_load_too(lm, requests, tmp_path):
    run_of(copy.deepcopy(lm), requests[:2], tmp_path)
    editor = editor_of(lm, {"logger": False}, record_texts=False)
    editor.load(tmp_path / "run")
    editor.fit(requests[2:4], evaluate=False)
    editor.journal.save(tmp_path / "saved")
    last = bodies(read_entries(tmp_path / "run/journal/ledger.jsonl"), BatchBody)[-1]
    assert (last.batch, len(last.hashes), last.requests) == (1, 2, [])
    saved = bodies(read_entries(tmp_path / "saved/ledger.jsonl"), BatchBody)
    assert [body.requests for body in saved] == [[], []]


def test_chats_belong_to_the_identity_and_runs_without_them_have_the_same_as_before():
    groups = (("{}",), ("I am. {}",))
    plain, chats = (inputs_of(Contexts(groups, each), [], Uniform(), {})["contexts"] for each in ((), ("ask: {}",)))
    assert plain == content_key(groups) != chats
