"""cakeflow: knowledge editing for transformer language models."""

from cakeflow.allocators import Allocator, Sequential, ShareAllocator, shares_from_fractions
from cakeflow.architecture import Architecture
from cakeflow.contexts import Contexts
from cakeflow.data import EditDataModule, read_requests
from cakeflow.editor import Editor
from cakeflow.errors import EditError, RequestError
from cakeflow.metrics import EditScore, Efficacy, Generalization, Specificity
from cakeflow.module import EditModule
from cakeflow.problem import LayerProblem, Update
from cakeflow.request import EditRequest, Probe
from cakeflow.solvers import LeastSquares, NullSpace, Solver
from cakeflow.statistics import Statistics
from cakeflow.targets import TargetOptimizer
from cakeflow.weighters import Endpoints, OneHot, Scores, Uniform, Weighter

__version__ = "0.1.0"
