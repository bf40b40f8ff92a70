"""The page of a suite: what stands in it, that it loads nothing, and that names from outside stay text."""

import json
import re
from pathlib import Path

import pytest
from report.reading import Page
from tiny_suites import facts

from cakeflow.report.intervals import estimate
from cakeflow.suites import Rows, arms_of, read_suite, render_suite, tables_of, to_markdown
from cakeflow.suites.page import facts_of
from cakeflow.suites.tables import grouped

OUT, WORDS = Path("out"), ["benchmark", "--suite", "mine suite.yaml"]
HOSTILE = "<script>document.title='owned'</script>"


@pytest.fixture
def made(write):
    """Suite, tables and page of two methods."""

    def made(**changes):
        suite = read_suite(write(**changes))
        arms = arms_of(suite)
        tables = tables_of(arms, Rows(OUT).measure(arms), OUT)
        return suite, tables, render_suite("mine", suite, tables, WORDS, OUT)

    return made


def test_every_number_and_hash_of_the_rows_is_on_the_page(made):
    suite, (table,), html = made()
    page = Page(html)
    text = " ".join(page.texts["table-1"].split())
    for line in table.lines:
        for name in suite.metrics:
            assert estimate(name, line.metrics[name]) in text
        for name in suite.metrics if line is not table.lines[0] else ():
            assert estimate(name, line.differences[name], "+") in text
        assert line.verdict in text
        for row in line.rows:
            for part in (row.arm, row.head[:12], row.settings["facts"][:12], row.protocol):
                assert part in page.texts["rows"]
            assert f"cakeflow reproduce out/runs/{row.arm}" in page.texts["repeat"]
    assert "cakeflow benchmark --suite 'mine suite.yaml'" in page.texts["repeat"]
    assert table.lines[0].rows[0].fingerprint in html
    assert table.lines[0].rows[0].machine["processor"] in html


def test_it_is_one_document_that_loads_nothing(made):
    _, _, html = made()
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    for tag in ("h1", "main", "header", "nav", "footer", "title"):
        assert page.tags.count(tag) == 1, tag
    links = {value for tag, name, value in page.attributes if (tag, name) == ("a", "href")}
    assert links == {"#main", "#table-1", "#repeat", "#rows"}
    assert [each for each in page.attributes if each[1] in ("src", "srcset", "data", "action")] == []
    assert set(re.findall(r"https?://[^\"'\s<]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert html.count("<svg") == 2


def test_it_is_the_same_for_the_same_rows(made):
    suite, tables, html = made()
    assert render_suite("mine", suite, tables, WORDS, OUT) == html


def test_names_from_outside_are_shown_and_not_run(made, tmp_path):
    (tmp_path / "facts.json").write_text(json.dumps(facts(target_new=HOSTILE)))
    _, _, html = made(data={"a<b>": {"source": "facts.json"}})
    assert HOSTILE not in html
    assert "a&lt;b&gt;" in html
    assert html.count("<script>") == 1


def test_a_fault_stands_in_place_of_numbers(made):
    methods = {"memit_seq": {}, "strict": {"method": "memit", "max_relative_update": 1e-9}}
    suite, tables, html = made(methods=methods)
    assert "NumericalError" in Page(html).texts["table-1"]
    assert "NumericalError" in to_markdown("mine", suite, tables, WORDS)


def test_markdown_has_the_same_numbers_group_by_group(made):
    suite, (table,), html = made()
    text = to_markdown("mine", suite, [table], WORDS)
    assert text.startswith("# Suite mine on toy\n\n- Model (SHA-256): " + table.lines[0].rows[0].fingerprint)
    assert "\n    cakeflow benchmark --suite 'mine suite.yaml'\n" in text
    assert "\n## own, 4 facts\n" in text
    parts = {part.splitlines()[0]: part for part in text.split("### ")[1:]}
    groups = grouped(suite.metrics)
    assert [*parts] == [*groups, "verdicts and costs"] == ["facts", "knowledge", "verdicts and costs"]
    for title, names in groups.items():
        head, _, *rows = cells_of(parts[title])
        assert head == ["method", *names]
        assert rows == [
            [line.method, *(estimate(name, line.metrics[name]) for name in names)] for line in table.lines
        ]  # fmt: skip
        assert title == "facts" or f"<summary>{title}</summary>" in html
    assert [row[0] for row in cells_of(parts["verdicts and costs"])[2:]] == [line.method for line in table.lines]


def cells_of(text):
    """Cells of the rows of a Markdown table."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("\\", "") for cell in row] for row in rows]


def test_facts_name_everything_that_differs_between_rows(made):
    _, (table,), _ = made()
    row = table.lines[0].rows[0]
    other = row.model_copy(update={"machine": {"system": "Plan 9"}, "threads": 7})
    facts = facts_of([row, other, row])
    assert facts["Model (SHA-256)"] == row.fingerprint
    assert facts["Machine"].split("; ")[1:] == ["Plan 9, 7 threads"]
