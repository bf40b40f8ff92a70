"""Numbers for a model that nobody has tuned, found by trials."""

from cakeflow.tuning.search import Tuning, tune
from cakeflow.tuning.trials import Numbers, Trial

__all__ = ["Numbers", "Trial", "Tuning", "tune"]
