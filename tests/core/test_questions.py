"""The part of an edit module that depends on the kind of its model."""

from cakeflow.core.module import EditModule
from cakeflow.core.questions import Questions


def test_a_method_for_another_kind_of_model_overrides_these_four():
    assert {name for name in vars(Questions) if not name.startswith("_") and callable(vars(Questions)[name])} == {
        "load", "check", "ask", "warn_of_known",
    }  # fmt: skip
    assert issubclass(EditModule, Questions)
    assert not {"load", "check", "ask", "warn_of_known"} & set(vars(EditModule))
