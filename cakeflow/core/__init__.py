"""The walk of an edit, and what holds it together."""

from cakeflow.core.callback import EditCallback, LayerEdit
from cakeflow.core.checkpoint import SafeCheckpointIO, with_safe_checkpoints
from cakeflow.core.config import build_callbacks, build_module, configs_of, find_config, shipped
from cakeflow.core.datamodule import EditDataModule
from cakeflow.core.decoys import choose_decoys
from cakeflow.core.locate_then_edit import LocateThenEdit
from cakeflow.core.memory import Footprint, TokenCost
from cakeflow.core.module import EditModule
from cakeflow.core.run import EvaluationResult, FitResult, run_evaluate, run_fit
from cakeflow.core.statistics import Statistics
from cakeflow.core.strategy import RankStrategy

__all__ = [
    "EditCallback", "EditDataModule", "EditModule", "EvaluationResult", "FitResult", "Footprint", "LayerEdit",
    "LocateThenEdit", "RankStrategy", "SafeCheckpointIO", "Statistics", "TokenCost", "build_callbacks", "build_module",
    "choose_decoys", "configs_of", "find_config", "run_evaluate", "run_fit", "shipped", "with_safe_checkpoints",
]  # fmt: skip
