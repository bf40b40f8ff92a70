"""Two processes that see half the records each agree with one that sees all."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from many_ranks import free_port
from torchmetrics import MetricCollection

from cakeflow.data import builtin_facts
from cakeflow.evaluation.evaluation import Evaluation
from cakeflow.testing import random_scores

TEXTS = [["Rome is the capital of Italy .", "Rome , Rome , Rome , Rome"], [], ["The sea is wide"], ["Lund is old"]]
REFERENCES = ["Rome in Italy", "never", None, builtin_facts()[0].reference]


def fed(records):
    """Every metric, fed with some of nine records (and of four with texts)."""
    metrics = Evaluation(answer_tokens=3, texts_every=1).metrics()
    for scores in random_scores():
        chosen = torch.isin(scores.record, torch.tensor(records))
        fields = {name: value[chosen] for name, value in vars(scores).items()}
        some = [i for i in records if i < len(TEXTS)]
        metrics.update(**fields, texts=[TEXTS[i] for i in some], references=[REFERENCES[i] for i in some])
    return metrics


def work(rank, port, queue):
    """One of two processes."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    metrics: MetricCollection = fed([0, 2, 4, 6, 8] if rank else [1, 3, 5, 7])
    queue.put((rank, {name: float(value) for name, value in metrics.compute().items()}))
    dist.destroy_process_group()


def test_two_processes_agree_with_one():
    port = free_port()
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["cakeflow.testing"])  # one import for both
    queue = context.SimpleQueue()
    processes = [context.Process(target=work, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    expected = {name: float(value) for name, value in fed(list(range(9))).compute().items()}
    for result in (queue.get()[1] for _ in processes):
        assert result == pytest.approx(expected, abs=1e-6)
    assert all(value == value for value in expected.values())
