"""A causal trace in the slot for whatever scores layers."""

import pytest
import torch

from cakeflow.tracing import Attribution, CausalTrace
from cakeflow.tracing.result import LAST_SUBJECT


def test_a_trace_scores_by_its_effects_at_the_last_subject_token(tiny, rows, monkeypatch, tmp_path):
    monkeypatch.setenv("CAKEFLOW_CACHE", str(tmp_path))
    trace = CausalTrace(tokens="all", draws=2, noise=0.4)
    scores = trace.attribute(tiny, rows, [0, 2])
    assert torch.equal(scores, trace.run(tiny, rows, [0, 2]).effects[:, LAST_SUBJECT])
    assert scores.shape == (len(rows), 2)
    alone = torch.cat([trace.attribute(tiny, [row], [0, 2]) for row in rows])
    torch.testing.assert_close(scores, alone, rtol=0, atol=1e-12)


def test_it_is_a_slot():
    with pytest.raises(TypeError, match="abstract"):
        Attribution()
