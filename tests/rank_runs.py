"""Edits on several ranks and in one process, and what they lead to."""

import torch
from many_ranks import in_ranks

from cakeflow import Contexts, Editor
from cakeflow.journal.ledger import bodies, read_entries
from cakeflow.journal.schema import BatchBody
from cakeflow.models import Site
from cakeflow.models.shards import whole
from cakeflow.storage.hashing import tensor_hash

CONTEXTS = Contexts((("{}",), ("I say. {}", "He said. {}")))
QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}


def weights(lm):
    """Hash of every parameter, whole."""
    return {name: tensor_hash(whole(tensor.detach())) for name, tensor in lm.model.state_dict().items()}


def ranks_of(count):
    """Arguments of a Trainer; one process has none of ours."""
    return {**QUIET, **({"devices": count} if count > 1 else {})}


def results(count, work, folder):
    """What every rank returned, or the one process."""
    if count == 1:
        return [work(0)]
    ended = in_ranks(count, work, folder)
    assert [each.status for each in ended] == [0] * count, [each.result for each in ended]
    return [each.result for each in ended]


def errors(count, work, folder):
    """The error of every rank that was not killed."""
    ended = in_ranks(count, work, folder)
    assert all(each.status for each in ended)
    return [each.result for each in ended if each.status == 1]


def edits(lm, method, count, trainer=None, **parts):
    """An editor with a recipe, which needs neither statistics nor a trace."""
    width = lm.oriented(Site(0, "mlp_out")).shape[1]
    moment = torch.diag(torch.linspace(0.001, 0.04, width, dtype=torch.float64))
    layers = [1, 3]
    given = {"layers": layers, "contexts": CONTEXTS, "moments": dict.fromkeys(layers, moment), "tile": 2}
    given |= {"scores": {1: 0.1, 3: 0.2}, "targets": {"steps": 3, "lr": 0.3}, **parts}
    return Editor.from_pretrained(
        lm.model, method, tokenizer=lm.tokenizer, trainer={**ranks_of(count), **(trainer or {})}, **given
    )


def outcome(editor, result):
    """What a run leads to, without times."""
    numbers = [(each.numbers, each.targets, each.facts) for each in bodies(ledger(result.folder), BatchBody)]
    return str((weights(editor.module.lm), result.before, result.after, result.protocol, numbers))


def ledger(folder):
    return list(read_entries(folder / "journal" / "ledger.jsonl"))
