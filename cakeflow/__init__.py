"""cakeflow: knowledge editing for transformer language models."""

from cakeflow.allocators import Allocator, Sequential, ShareAllocator, shares_from_fractions
from cakeflow.core.datamodule import EditDataModule
from cakeflow.core.locate_then_edit import LocateThenEdit
from cakeflow.core.statistics import Statistics
from cakeflow.data import read_requests
from cakeflow.data.contexts import Contexts
from cakeflow.data.request import EditRequest, Probe
from cakeflow.editor import Editor
from cakeflow.errors import EditError, RequestError
from cakeflow.evaluation.evaluation import Evaluation
from cakeflow.models.architecture import Architecture
from cakeflow.solvers import LeastSquares, NullSpace, Solver
from cakeflow.solvers.problem import LayerProblem, Update
from cakeflow.targets.gradient import GradientSearch
from cakeflow.weighters import Endpoints, OneHot, Scores, Uniform, Weighter

__version__ = "0.1.0"

__all__ = [
    "Allocator",
    "Architecture",
    "Contexts",
    "EditDataModule",
    "EditError",
    "EditRequest",
    "Editor",
    "Endpoints",
    "Evaluation",
    "GradientSearch",
    "LayerProblem",
    "LeastSquares",
    "LocateThenEdit",
    "NullSpace",
    "OneHot",
    "Probe",
    "RequestError",
    "Scores",
    "Sequential",
    "ShareAllocator",
    "Solver",
    "Statistics",
    "Uniform",
    "Update",
    "Weighter",
    "read_requests",
    "shares_from_fractions",
]
