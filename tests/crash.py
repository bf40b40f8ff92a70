"""Kill a process that edits, again and again, at random moments and at every named one; nothing acknowledged is lost.

    python tests/crash.py --kills 200

One process imports everything and forks the ones that are killed. A killed run goes on in the next process, until it is
done; after every kill the run folder is read as its owner would: ``verify`` finds nothing but an entry cut off, every
batch that was acknowledged is there, whole, and loading it gives the very weights of a run without interruption.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from conftest import GOLDEN, unpack
from stops import STOPS
from tiny_runs import editor_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from cakeflow.core.folder import is_finished
from cakeflow.journal.audit import verify
from cakeflow.journal.journal import Journal
from cakeflow.journal.ledger import whole_lines
from cakeflow.models.language import LanguageModel
from cakeflow.storage.hashing import tensor_hash

NAMES = ("Ann", "Bob", "Cid", "Dora", "Eve", "Finn")
FACTS = [{"prompt": "{} plays", "subject": name, "target_new": "tennis"} for name in NAMES]
"""One batch each."""


class Acknowledge(L.Callback):
    """Tells the parent of every batch that is done."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        """See Lightning."""
        os.write(self.pipe, bytes([len(module.journal)]))


def edit(lm: LanguageModel, folder: Path, pipe: int) -> None:
    """What the killed process does; on a copy, whose weights lie in memory as the reference's do: sums depend on it."""
    lm = copy.deepcopy(lm)
    trainer = {"callbacks": [Acknowledge(pipe)], "enable_model_summary": False}
    editor_of(lm, trainer).fit(FACTS, 1, evaluate=False, run_dir=folder)


def killed(lm: LanguageModel, folder: Path, wait: float | None, place: int) -> tuple[int, bool]:
    """Edit in a process of its own, killed after some seconds or at a moment.

    Returns:
        Batches that it told of, and whether it came to its end.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        try:
            with STOPS.at(place, signal.SIGKILL):
                edit(lm, folder, write)
            os._exit(0)
        except BaseException:
            os._exit(1)
    os.close(write)
    messages = b""
    if wait is not None:
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
    while chunk := os.read(read, 64) if select.select([read], [], [], 60)[0] else b"":
        messages += chunk
    os.close(read)
    status = os.waitpid(child, 0)[1]
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"the editing process failed with status {code}")
    return max(messages, default=0), code == 0


def hashes(lm: LanguageModel) -> dict[str, str]:
    """Of every weight."""
    return {name: tensor_hash(tensor) for name, tensor in lm.model.state_dict().items()}


def look(lm: LanguageModel, folder: Path, expected: list[dict[str, str]], messages: int) -> int:
    """Read what a killed process left; the number of batches in it."""
    if not (folder / "journal" / "ledger.jsonl").exists():
        assert messages == 0, "the ledger of an acknowledged batch is missing"
        return 0
    torn = [fault for fault in verify(folder).faults if "cut off" not in fault]
    assert not torn, torn
    if not whole_lines(folder / "journal" / "ledger.jsonl"):
        return 0
    journal = Journal(copy.deepcopy(lm))
    journal.load(folder / "journal")
    assert len(journal) >= messages, f"{messages} batches were acknowledged, {len(journal)} are there"
    assert hashes(journal.model) == expected[len(journal)], "the weights are not those of so many batches"
    return len(journal)


def reference(lm: LanguageModel) -> list[dict[str, str]]:
    """Hashes of the weights after every number of batches, from a run that nobody disturbs."""
    lm = copy.deepcopy(lm)
    editor, result = editor_of(lm, {"logger": False}), [hashes(lm)]
    editor.fit(FACTS, 1, evaluate=False)
    for _ in FACTS:
        result.insert(1, hashes(lm))
        editor.rollback(1)
    assert hashes(lm) == result[0]
    return result


def storm(lm: LanguageModel, kills: int, seed: int) -> dict[str, int]:
    """Kill so many times; half of it at random times, half at moments, one after the other."""
    draw, expected = random.Random(seed), reference(lm)
    start = time.perf_counter()
    edit(lm, Path(tempfile.mkdtemp()) / "run", os.open(os.devnull, os.O_WRONLY))
    whole, done, finished, place, result = time.perf_counter() - start, 0, 0, 0, 0
    folder = Path(tempfile.mkdtemp()) / "run"
    while done < kills:
        at_random = done % 2 == 0
        wait = draw.uniform(0.1, 1) * whole if at_random else None
        messages, ended = killed(lm, folder, wait, -1 if at_random else place)
        now = look(lm, folder, expected, max(messages, result))
        over = ended or is_finished(folder)
        result = 0 if over else now
        done += not ended
        place = place + 1 if not at_random and not ended else 0 if ended and not at_random else place
        if over:
            assert now == len(FACTS)
            finished += 1
            shutil.rmtree(folder.parent)
            folder = Path(tempfile.mkdtemp()) / "run"
    return {"kills": done, "finished": finished, "batches": len(FACTS)}


def main() -> None:
    """Kill, and say what was found."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        unpack("llama", Path(place))
        model = AutoModelForCausalLM.from_pretrained(Path(place) / "llama", dtype=torch.float32)
        lm = LanguageModel.wrap(copy.deepcopy(model), AutoTokenizer.from_pretrained(GOLDEN / "tokenizer"))
    result = storm(lm, args.kills, args.seed)
    sys.stdout.write(f"{result['kills']} kills, {result['finished']} runs finished in spite of them; nothing lost\n")


if __name__ == "__main__":
    main()
