"""Every shipped recipe as the parts that it is to be made of."""

from cakeflow_restrain import Prune, Rect
from cakeflow_sidememory import (
    CodebookSettings,
    FactorTraining,
    LearningRule,
    Retrieval,
    ShardSettings,
    TfidfRetriever,
    ValueTraining,
)
from cakeflow_streams import (
    ConflictHistory,
    FisherPenalty,
    Forgetting,
    MinorSpace,
    NormalizedGradient,
    PreservationQueue,
    RankSearch,
    RenewedNullSpace,
    ResidualBlend,
    SolvedTimes,
    SpectralGuard,
    SwapSearch,
    UnusedSpace,
)
from cakeflow_vision import GradientTargets, HeadTargets, RelativeRidge

from cakeflow import (
    Endpoints,
    LeastSquares,
    NullSpace,
    OneHot,
    Sequential,
    Uniform,
)  # fmt: skip
from cakeflow.solvers import Descent, EqualityConstrained, FromScratch, PlannedHistory
from cakeflow.targets import LossBelow, NormDecay, SolvedAndNear, TargetLikelihood

SPHERE = SpectralGuard(NullSpace(LeastSquares(1.0)), 0.5, 0.5, sides="input", unit_rows=True, weight="present")
PARTS = {
    "memit": (Uniform(), Sequential(), LeastSquares(), False),
    "memit_seq": (Uniform(), Sequential(), LeastSquares(), True),
    "memit_blue": (Endpoints(), Sequential(0.0, "self"), LeastSquares(), False),
    "alphaedit": (Uniform(), Sequential(), NullSpace(LeastSquares(1.0)), True),
    "alphaedit_blue": (Endpoints(), Sequential(0.0, "self"), NullSpace(LeastSquares(1.0)), True),
    "alphaedit_plus": (
        Uniform(),
        Sequential(),
        ResidualBlend(ConflictHistory(RankSearch(LeastSquares(10.0)))),
        True,
    ),
    "memit_seq_blue": (Endpoints(), Sequential(0.0, "self"), LeastSquares(), True),
    "rome": (OneHot(), Sequential(), EqualityConstrained(), False),
    "rome_official": (OneHot(), Sequential(), EqualityConstrained(at="prompt"), False),
    "ft": (OneHot(), Sequential(), Descent(), False),
    "emmet": (Uniform(), Sequential(), EqualityConstrained(), False),
    "pmet": (Uniform(), Sequential(0.5), LeastSquares(), False),
    "pmet_seq": (Uniform(), Sequential(0.5), LeastSquares(), True),
    "pmet_blue": (Endpoints(), Sequential(0.0, "self"), LeastSquares(), False),
    "rect": (Uniform(), Sequential(), Rect(), False),
    "rect_seq": (Uniform(), Sequential(), Rect(FromScratch()), True),
    "rect_blue": (Endpoints(), Sequential(0.0, "self"), Rect(), False),
    "prune": (Uniform(), Sequential(), Prune(), False),
    "prune_seq": (Uniform(), Sequential(), Prune(FromScratch(), every_batch=True), True),
    "prune_official": (Uniform(), Sequential(), Prune(double_add=True), False),
    "prune_blue": (Endpoints(), Sequential(0.0, "self"), Prune(), False),
    "forward_targets": (Uniform(), Sequential(0.0, "forward"), LeastSquares(), True),
    "hse": (Uniform(), Sequential(), PlannedHistory(planned=1000), True),
    "hse_official": (Uniform(), Sequential(), PlannedHistory(planned=1000), True),
    "revive": (Uniform(), Sequential(), SpectralGuard(), True),
    "sphere": (Uniform(), Sequential(), SPHERE, True),
    "evoedit": (Uniform(), Sequential(), NullSpace(UnusedSpace()), True),
    "betaedit": (Uniform(), Sequential(), RenewedNullSpace(cost=3000.0), True),
    "lyaplock": (Uniform(), Sequential(), PreservationQueue(), True),
    "suit": (Uniform(), Sequential(), MinorSpace(LeastSquares(10.0), 0.4), True),
    "ultraedit": (Uniform(), Sequential(), NormalizedGradient(), True),
    "encore": (Uniform(), Sequential(), LeastSquares(20.0), True),
}
"""Recipe -> weighter, allocator, solver, history; CAKE's are told apart below."""
OVER = {
    "cake": "alphaedit", "cake_paper": "alphaedit",
    "cake_memit": "memit", "cake_rect": "rect", "cake_prune": "prune", "cake_pmet": "pmet",
}  # fmt: skip
SHARDS = {
    "wise": (LearningRule(), ShardSettings()),
    "wise_merge": (LearningRule(), ShardSettings("merge")),
    "wise_oracle": (LearningRule(), ShardSettings()),
    "wise_always": (LearningRule(), ShardSettings(control="always")),
    "wise_never": (LearningRule(), ShardSettings(control="never")),
    "wise_official": (LearningRule(decay_everywhere=True, extra=1), ShardSettings(scope="sequence", longest=100)),
}
"""Recipe of a side memory -> how it learns, and its shards."""
FACTORS = {"training_rule": FactorTraining(), "retrieval": Retrieval(), "layer": -1, "role": "mlp.up_proj"}
BESIDE = {
    **{
        name: {"rule": rule, "shards": shards, "layer": -5, "oracle": name == "wise_oracle",
               "padding": "left" if name == "wise_official" else "right"}
        for name, (rule, shards) in SHARDS.items()
    },
    "a3e": {**FACTORS, "rule": "agreeing", "similarity_layer": 5},
    "a3e_official": {**FACTORS, "rule": "outermost", "similarity_layer": 5},
    "grace": {"layer": -5, "codebook": CodebookSettings(1.0), "training_settings": ValueTraining(1.0, 100, 0.01)},
    "retrieval": {"retriever": TfidfRetriever(0.5, 1, subjects=True), "template": "New fact: {facts}\nPrompt: "},
}  # fmt: skip
"""Recipe of a memory beside the weights, or of none -> attributes of its module."""
OFFICIAL = {
    "cake_official": (10.0, 0.5, 0.4),
    "cake_official_gpt_j": (30.0, 0.75, 0.5),
    "cake_official_gpt2_xl": (40.0, 0.75, 0.5),
}
"""Recipe -> ridge, clamp and decay of CAKE's released configs."""
"""CAKE over a method: its weights, everything else as there."""
SEARCHES = {"suit": SwapSearch}
"""Recipe -> search in place of ``GradientSearch``."""
STATISTICS = {"suit": {"at": "names"}}
"""Recipe -> what it sets of the statistics."""
TARGETS = {
    "hse_official": {
        "likelihood": TargetLikelihood(0.8), "one_by_one": True,
        "further": (Forgetting(0.2, space=False), FisherPenalty(0.1)),
    },
    "hse": {"likelihood": TargetLikelihood(0.8), "further": (Forgetting(0.2), FisherPenalty(0.1))},
    "rome": {"site": "mlp_out", "clamp": 4.0},
    "cake_official_gpt": {"clamp": 0.75, "decay": NormDecay(0.5)},
    "cake_official": {"clamp": 0.5, "decay": NormDecay(0.4)},
    "pmet": {
        "site": "mlp_out", "extra_site": "attn_out", "likelihood": TargetLikelihood(solved_factor=0.1),
        "stop": SolvedAndNear(0.01, LossBelow(0.05)),
    },
    "encore": {"likelihood": TargetLikelihood(solved_in="sampled"), "stop": SolvedTimes(2)},
}  # fmt: skip

IMAGES = {
    "vit_heads": (HeadTargets(3), RelativeRidge(0.01), 0.0),
    "vit_heads_null": (HeadTargets(3), NullSpace(LeastSquares(1e-4), 0.01), 0.0),
    "vit_random_heads": (HeadTargets(3, ranking="random"), RelativeRidge(0.01), 0.0),
    "vit_gradient": (GradientTargets(), RelativeRidge(0.01), 0.0),
    "vit_ft": (HeadTargets(), Descent(100, 1e-3, None), 0.0),
    "vit_ft_kl": (HeadTargets(), Descent(300, 1e-3, None), 10.0),
    "vit_gradient_ridge": (GradientTargets(lr=0.0175), RelativeRidge(0.2), 0.0),
    "vit_heads_direct": (HeadTargets(6, ranking="direct", effect="direct"), RelativeRidge(0.01), 0.0),
}
"""Recipe of a classifier's edit -> targets, solver, weight of the divergence on unrelated images."""
BODIES = {
    "vit_heads_removed": {"heads": HeadTargets(3), "realign": True, "agree": 1.0, "ridge": 0.01},
    "vit_alphaedit": {"layers": (-3, -2, -1), "tokens": "first", "solver": NullSpace(LeastSquares(1e-4), 0.01)},
    "vit_memit": {"layers": (-4, -3, -2), "tokens": "all", "solver": RelativeRidge(0.01)},
    "vit_rome": {"layers": (-4,), "tokens": "all", "solver": RelativeRidge(0.01)},
}
"""Recipe that edits the blocks of an image classifier -> its settings."""
