"""cakeflow: knowledge editing for transformer language models."""

from cakeflow.allocators import Allocator, Jacobian, Sequential, ShareAllocator
from cakeflow.core import EditDataModule, EditModule, LocateThenEdit, Statistics
from cakeflow.data import Contexts, EditRequest, Probe, read_requests
from cakeflow.editor import Editor
from cakeflow.errors import EditError, RequestError
from cakeflow.evaluation import Evaluation
from cakeflow.models import Architecture
from cakeflow.solvers import LayerProblem, LeastSquares, NullSpace, Solver, Update
from cakeflow.targets import GradientSearch, TargetSearch
from cakeflow.weighters import Endpoints, OneHot, Scores, Uniform, Weighter

__version__ = "0.1.0"

__all__ = [
    "Allocator", "Architecture", "Contexts", "EditDataModule", "EditError", "EditModule", "EditRequest", "Editor",
    "Endpoints", "Evaluation", "GradientSearch", "Jacobian", "LayerProblem", "LeastSquares", "LocateThenEdit",
    "NullSpace", "OneHot", "Probe", "RequestError", "Scores", "Sequential", "ShareAllocator", "Solver", "Statistics",
    "TargetSearch", "Uniform", "Update", "Weighter", "read_requests",
]  # fmt: skip
