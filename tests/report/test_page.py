"""The page of a run: what stands in it, what must not, and how it behaves in a real browser."""

import json
import re
import shutil
import sys
import time

import pytest
from bodies import body

from cakeflow.cli.command_line import run_command as main
from cakeflow.core.config import shipped
from cakeflow.export.manifest import utc
from cakeflow.journal.ledger import Ledger
from cakeflow.report import RunFolder, render_page
from cakeflow.report.intervals import Interval, estimate, number, record_values

from .reading import Page

SECTIONS = (
    "metrics", "answers", "relations", "edits", "layers", "targets", "moments", "ability", "cost", "config", "versions",
)  # fmt: skip
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)> & \"q\" 'a' $x_1$ {{ 7*7 }} \ud800"
HOSTILE += " \x1b[2J \u202eeulb\u202c"


@pytest.fixture
def page(run_folder):
    return Page(render_page(RunFolder.read(run_folder)))


def words(text):
    """A text with its white space evened out."""
    return " ".join(text.split())


def test_it_is_one_document_with_landmarks_and_unique_ids(page):
    assert len(page.ids) == len(set(page.ids))
    for tag in ("h1", "main", "header", "nav", "footer", "title"):
        assert page.tags.count(tag) == 1, tag
    assert set(SECTIONS) == set(page.texts)
    links = {value for tag, name, value in page.attributes if (tag, name) == ("a", "href")}
    assert links == {"#main", *(f"#{name}" for name in SECTIONS)}
    targets = {value[1:] for _, name, value in page.attributes if name.endswith("href") and value[0] == "#"}
    assert targets <= set(page.ids)


def test_it_loads_nothing(run_folder):
    html = render_page(RunFolder.read(run_folder))
    page = Page(html)
    loading = [
        (tag, name, value) for tag, name, value in page.attributes if name in ("src", "srcset", "data", "action")
    ]
    assert loading == []
    assert [value for tag, name, value in page.attributes if name.endswith("href") and value[0] != "#"] == ["data:,"]
    assert set(re.findall(r"https?://[^\"'\s<]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}


def test_metrics_have_intervals_before_after_and_between(run_folder, page):
    run, text = RunFolder.read(run_folder), words(page.texts["metrics"])
    before, after = record_values(run.before), record_values(run.after)
    for name in ("efficacy", "generalization", "specificity", "editscore", "efficacy_exact"):
        sides = [Interval.of(before[name]), Interval.of(after[name])]
        row = [estimate(name, side) for side in sides] + [
            estimate(name, Interval.of(after[name] - before[name], -1.0), "+")
        ]
        assert "".join([name, *row]) in text
    assert f"margin{number(-2.5)}1.5+4" in text


def test_relations_edits_layers_targets_and_costs(run_folder, page):
    run = RunFolder.read(run_folder)
    texts = {name: words(text) for name, text in page.texts.items()}
    for relation, example in (("P103", "The mother tongue of {} is"), ("P19", "{} was born in")):
        group = [record for record in run.after if record.relation == relation]
        assert f"{relation}{example}{len(group)}" in texts["relations"]
        assert estimate("efficacy", Interval.of(record_values(group)["efficacy"])) in texts["relations"]
    assert "{} plays the sport of" in texts["relations"]
    for index, (record, edit) in enumerate(zip(run.after, run.edits, strict=True)):
        assert record.subject in texts["edits"]
        assert f"Neighbor 0 of {index}" in texts["edits"] or record.target_true is None
        loss = number(edit.targets[0].loss)
        assert f"Batch {edit.batch}. Target at layer 9: loss {loss}, probability 0.9, 20 steps." in texts["edits"]
        for prompt in record.prompts:
            assert prompt.prompt in texts["edits"]
            assert number(prompt.expected_logprob, ".2f") in texts["edits"]
    assert "work that before editing" in texts["edits"]
    assert "work that after editing" in texts["edits"]
    for name, value in run.log[-1].items():  # the last batch
        if name.startswith("layer"):
            assert number(value) in texts["layers"], name
    assert "ability acccloze80.48 [0.4408, 0.5192]" in texts["ability"]
    assert "neutral perplexityperplexity822" in texts["ability"]
    for shown in ("targets", "20.00", "37 %", "1.667", "0.500"):
        assert shown in texts["cost"]
    assert "# a comment" in texts["config"]
    assert "Jacobian(damping=0.0)" in texts["config"]
    assert "2.13.0" in texts["versions"]
    alts = [value for _, name, value in page.attributes if name == "aria-label"]
    assert any("median 0.07738, from 0.04167 to 0.5" in alt for alt in alts)
    assert any(alt.startswith("share by layer: layer 5 ") for alt in alts)


def test_the_page_says_who_ran_it_when_and_on_what(run_folder):
    ledger = Ledger(run_folder / "journal" / "ledger.jsonl")
    end = ledger.append(body("end"))
    head = words(Page(render_page(RunFolder.read(run_folder))).header)
    assert "Run byann@host" in head
    assert f"Started{utc(ledger.entries[0].time)} Ended{utc(end.time)}" in head
    assert "Versionscakeflow 0.1.0, torch 2.13.0" in head
    assert "taken back" not in head


def test_a_thousand_records_are_rendered_in_seconds(make_run):
    run = RunFolder.read(make_run(size=1000, batch=100))
    start = time.process_time()
    render_page(run)
    assert time.process_time() - start < 20  # about 3 on an idle core


def hostile(value):
    """The same record with a hostile text at the end of every text, the kinds of prompts aside."""
    if isinstance(value, dict):
        return {key: part if key == "kind" else hostile(part) for key, part in value.items()}
    if isinstance(value, list):
        return [hostile(part) for part in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_everything_from_the_run_is_escaped(make_run):
    folder = make_run(change=hostile)
    info = json.loads((folder / "run.json").read_text())
    named = {name: {f"{HOSTILE}{key}": value for key, value in info[name].items()} for name in ("timings", "versions")}
    info = hostile(info | {"model": info["model"] | {"architecture": {HOSTILE: HOSTILE}}}) | named
    (folder / "run.json").write_text(json.dumps(info))
    table = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(table.replace("cloze", "<script>x<_script>$y").replace("drift", "<b>$z"))
    (folder / "config.yaml").write_text("model: </pre><script>alert(1)</script>\n")
    html = render_page(RunFolder.read(folder))
    assert not re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", html)
    assert r"\u202eeulb\u202c" in html
    page = Page(html)
    clean = Page(render_page(RunFolder.read(make_run("clean"))))
    assert page.tags.count("script") == clean.tags.count("script") == 1
    assert page.tags.count("img") == page.tags.count("b") - clean.tags.count("b") == 0
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "<script>document.title='owned'</script>" in page.texts["edits"]
    assert "{{ 7*7 }}" in page.texts["edits"]


def test_the_same_run_gives_the_same_page(run_folder):
    assert render_page(RunFolder.read(run_folder)) == render_page(RunFolder.read(run_folder))


@pytest.mark.parametrize(("rival", "words_there"), [(True, "Efficacy"), (False, "needs facts with a true target")])
def test_relations_have_no_column_that_nothing_fills(make_run, rival, words_there):
    def bare(record):
        (prompt,) = [each for each in record["prompts"] if each["kind"] == "rewrite"]
        return record | {"prompts": [prompt if rival else prompt | {"rival": None, "rival_logprob": None}]}

    text = words(Page(render_page(RunFolder.read(make_run(change=bare)))).texts["relations"])
    assert words_there in text
    assert "Generalization" not in text


def test_a_run_that_was_not_evaluated_says_so_and_shows_the_rest(run_folder):
    info = json.loads((run_folder / "run.json").read_text())
    (run_folder / "run.json").write_text(json.dumps({name: info[name] for name in ("model", "settings", "versions")}))
    for name in ("before.jsonl", "after.jsonl", "config.yaml"):
        (run_folder / name).unlink()
    texts = Page(render_page(RunFolder.read(run_folder))).texts
    assert "Not evaluated" in texts["metrics"]
    assert "No relations" in texts["relations"]
    assert "Person 11" in texts["edits"]
    assert "No timings" in texts["cost"]
    assert "No YAML" in texts["config"]
    assert "Numbers per layer" not in texts["layers"]
    assert "relative_update" in texts["layers"]
    shutil.rmtree(run_folder / "journal")
    (run_folder / "metrics.csv").unlink()
    texts = Page(render_page(RunFolder.read(run_folder))).texts
    assert "No edits" in texts["edits"]
    assert "No numbers per layer" in texts["layers"]
    assert "No target losses" in texts["targets"]
    assert "No curve" in texts["moments"]
    assert "Not measured" in texts["ability"]


def test_points_of_second_moments_that_cannot_be_are_left_out(run_folder):
    info = json.loads((run_folder / "run.json").read_text())
    real = {"tokens": 4096, "change": 0.5, "threshold": 0.02, "null": 7}
    forged = [{**real, "tokens": 0}, {**real, "change": None}, {**real, "change": -1.0}]
    for points, words in ((forged, "No curve"), ([*forged, real], "Null directions")):
        (run_folder / "run.json").write_text(json.dumps({**info, "convergence": {"5": points, "<marquee>": points}}))
        page = Page(render_page(RunFolder.read(run_folder)))
        assert words in page.texts["moments"]
        assert "marquee" not in page.tags


def test_shares_and_drift_that_were_not_logged_are_missed(run_folder):
    assert "No shares" not in Page(render_page(RunFolder.read(run_folder))).texts["layers"]
    table = (run_folder / "metrics.csv").read_text()
    (run_folder / "metrics.csv").write_text(table.replace("/share", "/left_alone").replace("/drift", "/mismatch"))
    text = Page(render_page(RunFolder.read(run_folder))).texts["layers"]
    for words in ("No shares", "No drift", "left_alone", "mismatch"):
        assert words in text


@pytest.mark.parametrize("missing", ["before", "after"])
def test_half_an_evaluation_is_shown(run_folder, missing):
    (run_folder / f"{missing}.jsonl").unlink()
    text = Page(render_page(RunFolder.read(run_folder))).texts["metrics"]
    assert f"no {missing}.jsonl" in text


def test_a_real_run_through_the_command_line(workplace, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cakeflow"])
    facts = [
        {"prompt": "{} lives in", "subject": name, "target_new": "Rome", "target_true": "Paris"}
        for name in ("Ann", "Bob")
    ]
    (workplace / "facts.json").write_text(json.dumps(facts))
    (workplace / "corpus.txt").write_text("The city of Rome is near the sea. " * 200)
    options = {
        "config": shipped("method")["alphaedit"],
        "model.base": "model",
        "model.layers": "[1,2]",
        "model.solver.init_args.threshold": 10,
        "model.solver.init_args.inner.init_args.ridge": 0.01,
        "model.statistics.source": "corpus.txt",
        "model.statistics.tokens": 1024,
        "model.statistics.window": 64,
        "data.source": "facts.json",
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks+": "cakeflow_theory.ResidualDrift",
    }
    done = main(["fit", *(f"--{name}={value}" for name, value in options.items())])
    written = main(["report", str(done.folder)])
    assert str(written) in capsys.readouterr().out.replace("\n", "")
    page = Page(written.read_text())
    texts = page.texts
    assert number(100 * done.after["efficacy"], ".1f") in texts["metrics"]
    for step in done.journal:
        for request, target in zip(step.requests, step.targets, strict=True):
            assert request.subject in texts["edits"]
            assert f"loss {number(target.loss)}, " in texts["edits"]
    for layer in ("1", "2"):
        points = RunFolder.read(done.folder).info.convergence[layer]
        assert points[-1].tokens == 1024
        assert f"layer {layer}" in texts["moments"]
        assert f"after {points[-1].tokens} tokens" in str(page.attributes)
    for name in ("share", "drift", "residual"):
        assert number(done.logged[f"layer2/{name}"]) in texts["layers"]
    assert "No drift" not in texts["layers"]
    assert "class_path" in texts["config"]
    assert main(["report", str(done.folder), "--out", "other.html"]).read_text() == written.read_text()
    capsys.readouterr()


@pytest.fixture
def visit(chromium, make_run, tmp_path):
    """Opens the page of a run of 40 hostile edits, and collects everything the browser complains of or asks for."""
    folder = make_run(size=40, change=hostile)
    main(["report", str(folder)])
    address, complaints, contexts = (folder / "report.html").as_uri(), [], []

    def open_page(**settings):
        context = chromium.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: complaints.extend({request.url} - {address}))
        page.goto(address)
        return page

    yield open_page
    assert complaints == []
    for context in contexts:
        context.close()


def test_browser_filters_and_sorts(visit):
    page = visit()
    assert "owned" not in page.title()
    rows = page.locator("#edit-list > div:visible")
    assert rows.count() == 40
    page.fill("#edit-find", "p19 PERSON 4")
    numbers = [int(text) for text in rows.locator(".number").all_text_contents()]
    assert numbers == [index for index in range(40) if index % 3 == 1 and "4" in str(index)]
    assert page.inner_text("#edit-count") == f"{len(numbers)} of 40 edits"
    page.fill("#edit-find", "")
    page.select_option("#edit-show", "paraphrase")
    rates = [float(row.get_attribute("data-paraphrase")) for row in rows.all()]
    assert rates
    assert max(rates) < 1
    page.select_option("#edit-show", "")
    page.select_option("#edit-sort", "neighborhood")
    rates = [float(row.get_attribute("data-neighborhood") or "inf") for row in rows.all()]
    assert rates == sorted(rates)
    assert len(set(rates)) > 2
    page.click("#edit-open")
    assert page.locator("#edit-list details[open]").count() == 40
    page.click("#edit-close")
    assert page.locator("#edit-list details[open]").count() == 0
    head = page.locator("#layers th", has_text="share")
    for _ in range(2):
        head.locator("button").click()
        values = [float(text) for text in page.locator("#layers tbody td:nth-child(2)").all_inner_texts()]
        assert values == sorted(values, reverse=head.get_attribute("aria-sort") == "descending")
    assert head.get_attribute("aria-sort") == "ascending"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_on_a_phone(visit, scheme):
    page = visit(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.locator("#edit-list summary").first.click()
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    wide = "[...document.querySelectorAll('.scroll')].filter(each => each.scrollWidth > each.clientWidth).length"
    assert page.evaluate(wide) > 0
    captions = "[...document.querySelectorAll('caption')].map(each => each.getBoundingClientRect().right)"
    assert max(page.evaluate(captions)) < 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(247, 247, 249)" if scheme == "light" else "rgb(20, 21, 27)"
    )


def test_browser_by_keyboard(visit):
    page = visit()

    def focused():
        return page.evaluate("(({id, textContent}) => id || textContent.trim())(document.activeElement)")

    page.keyboard.press("Tab")
    assert focused() == "Skip to the content"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    reached = []
    while "edit-close" not in reached and len(reached) < 100:
        page.keyboard.press("Tab")
        reached.append(focused())
        style = page.evaluate("(({outlineStyle}) => outlineStyle)(getComputedStyle(document.activeElement))")
        assert style != "none", reached[-1]
    assert {"edit-find", "edit-show", "edit-sort", "edit-open"} <= set(reached)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator("#edit-list details").first.get_attribute("open") is not None


def test_browser_without_scripts(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("#edit-controls").is_hidden()
    assert page.locator("#edit-list > div").count() == 40
    page.locator("#edit-list summary").first.click()
    assert page.locator("#edit-list table").first.is_visible()
