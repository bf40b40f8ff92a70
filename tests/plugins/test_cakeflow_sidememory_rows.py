"""The rows from which a side memory learns: labels, padding, and what counts."""

import pytest
import torch
from cakeflow_sidememory.distance import row_distances
from cakeflow_sidememory.rows import LENGTHS, SEEDS, edit_rows, sampled_contexts

from cakeflow.forward.tokens import Row

SHORT, LONG = Row((1, 2, 3, 9, 8), 0, 3), Row((4, 5, 1, 2, 3, 9, 8), 0, 5)


def test_clean_rows_label_the_target_alone_and_count_no_padding():
    rows = edit_rows([SHORT, LONG], (6, 6, 6, 6, 6, 6, 6, 6, 6), "right", 0)
    assert rows.ids.tolist()[0] == [1, 2, 3, 9, 8, 0, 0, 0, 0]
    assert rows.mask.sum(1).tolist() == [5, 7, 9]
    assert torch.equal(rows.counted, rows.mask)
    assert [row[row != -100].tolist() for row in rows.labels] == [[9, 8], [9, 8], []]
    row, column, label = rows.places
    assert [*zip(row.tolist(), column.tolist(), label.tolist(), strict=True)] == [
        (0, 2, 9), (0, 3, 8), (1, 4, 9), (1, 5, 8),
    ]  # fmt: skip


@pytest.mark.parametrize("scope", ["prompt", "token"])
def test_where_a_prompt_decides_its_own_tokens_are_learned_from(scope):
    rows = edit_rows([SHORT, LONG], (6, 6, 6, 6, 6, 6, 6, 6, 6), "right", 0, scope)
    whole = edit_rows([SHORT, LONG], (6, 6, 6, 6, 6, 6, 6, 6, 6), "right", 0)
    assert [row.nonzero()[:, 0].tolist() for row in rows.counted] == [[0, 1, 2], [2, 3, 4], [*range(9)]]
    assert torch.equal(rows.labels, whole.labels)
    assert torch.equal(rows.mask, whole.mask)


def test_official_rows_count_padding_and_label_prompts_behind_a_long_irrelevant_text():
    """Trap 4 of the code: as many positions as the longest prompt has are left out of every row, from the left."""
    rows = edit_rows([SHORT, LONG], (6,) * 9, "left", 0)
    assert rows.ids.tolist()[0] == [0, 0, 0, 0, 1, 2, 3, 9, 8]
    assert rows.counted.all()
    assert rows.mask.sum(1).tolist() == [5, 7, 9]
    assert [row[row != -100].tolist() for row in rows.labels] == [[2, 3, 9, 8], [2, 3, 9, 8], [6, 6, 6, 6]]


def test_padding_does_not_make_a_row_long():
    distances, counted = torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0, 0.0]]), torch.tensor([[True] * 3 + [False] * 3])
    assert row_distances(distances[:, :3], counted[:, :3], longest=5).tolist() == [2.0]
    assert row_distances(distances, counted, longest=5).tolist() == [2.0]
    assert row_distances(distances, counted, longest=2).tolist() == [3.0]


def test_official_rows_are_right_where_the_longest_prompt_is_in_the_longest_row():
    rows = edit_rows([SHORT, LONG], (6,) * 4, "left", 0)
    assert [row[row != -100].tolist() for row in rows.labels[:2]] == [[9, 8], [9, 8]]


def test_contexts_are_the_bare_prompt_and_ten_beginnings(lm):
    contexts = sampled_contexts(lm, 3)
    assert contexts.templates[0] == "{}"
    assert len(contexts.templates) == 1 + len(SEEDS) * len(LENGTHS)
    assert all(template.endswith(" {}") for template in contexts.templates[1:])
    assert contexts == sampled_contexts(lm, 3)
    assert contexts != sampled_contexts(lm, 4)
