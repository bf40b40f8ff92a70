"""The edit method of a codebook: each fact leaves a key, a value and a label beside one projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics import Metric

from cakeflow.data import Contexts, EditRequest
from cakeflow.errors import LedgerError
from cakeflow.evaluation import Evaluation
from cakeflow.forward import TextBatch, encode_batch
from cakeflow.journal import EditStep, ModuleChange
from cakeflow.models import LanguageModel
from cakeflow_sidememory.codebook import Codebook, CodebookSettings, rows_of_table, table
from cakeflow_sidememory.questions import RoutedEdit
from cakeflow_sidememory.stored import REMEDY, counts, numbers
from cakeflow_sidememory.values import ValueTraining, learn_entry


@dataclass(frozen=True, eq=False)
class CodebookChange(ModuleChange):
    """Facts added to a codebook; the first ones put it in place.

    Keys and values depend on the unedited model and their fact alone, and balls are derived from all keys and labels
    that are there. So any batch can be taken back, and what is left is what the other batches alone give.

    Attributes:
        place: Name of the projection.
        eps: Radius of a new ball.
        keys: Key of each fact.
        values: Its value.
        labels: Tokens of its target.
    """

    place: str
    eps: float
    keys: Float[Tensor, "n d_in"]
    values: Float[Tensor, "n d_out"]
    labels: tuple[tuple[int, ...], ...]

    def build(self, module: nn.Module) -> Codebook:
        """Return a new codebook; ``module`` stays as it is.

        Raises:
            ShapeError: If keys or values are not of the projection's widths.
        """
        return Codebook.around(module, CodebookSettings(self.eps)).grown(self.keys, self.values, self.labels)

    def tensors(self) -> dict[str, Tensor]:
        """Keys, values, labels and radius."""
        eps = torch.tensor([self.eps], dtype=torch.float64)
        return {"keys": self.keys, "values": self.values, "labels": table(self.labels), "eps": eps}

    @classmethod
    def from_tensors(cls, place: str, tensors: Mapping[str, Tensor]) -> CodebookChange:
        """Return the change with these tensors.

        Raises:
            LedgerError: If the radius is missing or no number above 0, there is not one value and label per key, or
                they are not finite.
        """
        (keys, values), (labels,) = numbers(place, tensors, keys=2, values=2), counts(place, tensors, labels=2)
        radius = tensors["eps"].flatten()
        eps = float(radius[0]) if len(radius) == 1 else float("nan")
        if not eps > 0 or not len(keys) == len(values) == len(labels):
            raise LedgerError(
                f"the codebook at {place} has the radius {radius.tolist()}, {len(keys)} keys, {len(values)} values and "
                f"{len(labels)} labels: one radius above 0, one of each per fact; {REMEDY}"
            )
        return cls(place, eps, keys, values, tuple(rows_of_table(labels)))


@final
class CodebookMemory(RoutedEdit):
    """Keeps facts as entries of a codebook beside one projection: a control that hardly generalises; the model stays.

    GRACE (Hartvigsen et al. 2023, "Aging with GRACE", arXiv 2211.11031): the key is the projection's input at the last
    token of the prompt, the value is trained until the target follows, and a radius says which other prompts get it
    (``Codebook``, ``fold``). Departures: every value begins as the projection's own output and is trained by itself,
    also where a ball grows over a further fact (the code trains the ball's value on), so that a batch depends on no
    other one; labels are compared token by token; a fact that has an earlier one's key takes its place.

    Args:
        base: Name or folder of a model, or a ``LanguageModel``.
        layer: Block of the projection; negative numbers count from the last. EasyEdit has -5 for Llama-2.
        role: The projection, by its role or its path in the block.
        codebook: Rules of the codebook; its radius belongs to the model and the layer.
        training: How a value is trained.
        oracle: Whether an oracle routes the questions of evaluations, for measuring only (``RoutedEdit``).
        evaluation: What the model is asked.
        metrics: Further metrics of every evaluation.
        record_texts: Whether the ledger has the texts of the requests.
        private: Whether only their owner can read the run folders that are made.

    Raises:
        ConfigError: If the model has no such block.
    """

    def __init__(
        self,
        base: str | LanguageModel = "smollm2-135m",
        layer: int = -5,
        role: str = "mlp_out",
        codebook: CodebookSettings = CodebookSettings(),
        training: ValueTraining = ValueTraining(),
        oracle: bool = False,
        evaluation: Evaluation = Evaluation(),
        metrics: Sequence[Metric] = (),
        record_texts: bool = True,
        private: bool = True,
    ) -> None:
        super().__init__(base, evaluation, metrics, {}, record_texts=record_texts, private=private)
        self.layer, self.role, self.oracle = layer, role, oracle
        self.codebook, self.training_settings = codebook, training
        if isinstance(base, LanguageModel):
            self.check_model()

    def settings(self) -> dict[str, Any]:
        """Return all arguments that decide the outcome."""
        plain = {name: getattr(self, name) for name in ("layer", "role", "oracle")}
        parts = {"codebook": asdict(self.codebook), "training": asdict(self.training_settings)}
        return {**plain, **parts, "evaluation": repr(self.evaluation)}

    def encode(self, requests: Sequence[EditRequest]) -> TextBatch:
        """Tokenize all prompts with their targets."""
        return encode_batch(self.lm, requests, Contexts())

    def prepare(self, batches: Sequence[TextBatch]) -> None:
        """Check that the projection can be replaced."""
        if not isinstance(self.lm.module(self.site), Codebook):
            self.lm.weight(self.site)

    def edit(self, batch: TextBatch, step: EditStep) -> None:
        """Learn the facts of a batch one by one, and put them in place together."""
        place = self.lm.architecture.path(self.site)
        Codebook.around(self.lm.module(self.site), self.codebook)
        with self.phase("memory"):
            entries = [learn_entry(self.lm, self.site, rows[0], self.training_settings) for rows in batch.rows]
        keys, values = (torch.stack([getattr(each, name).cpu() for each in entries]) for name in ("key", "value"))
        change = CodebookChange(place, self.codebook.eps, keys, values, tuple(each.label for each in entries))
        self.journal.apply(step, change, {"facts": float(len(entries))})
        module = self.lm.module(self.site)
        numbers = {"loss": sum(each.losses[-1] for each in entries) / len(entries)}
        if isinstance(module, Codebook):
            balls = module.radius[module.radius > 0]
            numbers |= {"balls": float(len(balls)), "radius": float(balls.mean())}
        for name, value in numbers.items():
            self.log(f"memory/{name}", value, batch_size=len(batch))
