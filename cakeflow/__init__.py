"""cakeflow: knowledge editing for transformer language models."""

from cakeflow.allocators import Allocator, Sequential, ShareAllocator, shares_from_fractions
from cakeflow.architecture import Architecture
from cakeflow.contexts import Contexts
from cakeflow.data import EditDataModule, read_requests
from cakeflow.editor import Editor
from cakeflow.errors import EditError, RequestError
from cakeflow.evaluation import Evaluation
from cakeflow.module import EditModule
from cakeflow.problem import LayerProblem, Update
from cakeflow.request import EditRequest, Probe
from cakeflow.solvers import LeastSquares, NullSpace, Solver
from cakeflow.statistics import Statistics
from cakeflow.targets import TargetOptimizer
from cakeflow.weighters import Endpoints, OneHot, Scores, Uniform, Weighter

__version__ = "0.1.0"

__all__ = [
    "Allocator",
    "Architecture",
    "Contexts",
    "EditDataModule",
    "EditError",
    "EditModule",
    "EditRequest",
    "Editor",
    "Endpoints",
    "Evaluation",
    "LayerProblem",
    "LeastSquares",
    "NullSpace",
    "OneHot",
    "Probe",
    "RequestError",
    "Scores",
    "Sequential",
    "ShareAllocator",
    "Solver",
    "Statistics",
    "TargetOptimizer",
    "Uniform",
    "Update",
    "Weighter",
    "read_requests",
    "shares_from_fractions",
]
