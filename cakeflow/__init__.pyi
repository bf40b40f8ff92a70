from . import (
    allocators,
    callbacks,
    core,
    data,
    desk,
    errors,
    evaluation,
    export,
    forward,
    journal,
    metrics,
    models,
    ranks,
    report,
    solvers,
    storage,
    targets,
    testing,
    tracing,
    tuning,
    weighters,
)
from .allocators import Allocator, Jacobian, Sequential, ShareAllocator
from .core import EditDataModule, EditModule, LocateThenEdit, Statistics
from .data import Contexts, EditRequest, Probe, read_requests
from .editor import Editor
from .errors import EditError, RequestError
from .evaluation import Evaluation
from .models import Architecture
from .solvers import LayerProblem, LeastSquares, NullSpace, Solver, Update
from .targets import GradientSearch, TargetSearch
from .weighters import Endpoints, OneHot, Scores, Uniform, Weighter

__version__: str

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
    "GradientSearch",
    "Jacobian",
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
    "TargetSearch",
    "Uniform",
    "Update",
    "Weighter",
    "allocators",
    "callbacks",
    "core",
    "data",
    "desk",
    "errors",
    "evaluation",
    "export",
    "forward",
    "journal",
    "metrics",
    "models",
    "ranks",
    "read_requests",
    "report",
    "solvers",
    "storage",
    "targets",
    "testing",
    "tracing",
    "tuning",
    "weighters",
]
