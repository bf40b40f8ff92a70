"""The page in a real browser."""

import re

import pytest
from tiny_runs import content

from cakeflow.callbacks import PolicyGuard
from cakeflow.journal import Policy

from .conftest import FACT, OTHER

HOSTILE = "Ann <img src=x onerror=alert(1)> lives in"


@pytest.fixture
def visit(chromium):
    """Opens a page, and collects everything the browser complains of or asks others for."""
    complaints, contexts = [], []

    def open_page(client, path=None, **settings):
        context = chromium.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        own = tuple(f"http://{host}/" for host in client.server.hosts)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: complaints.extend([] if request.url.startswith(own) else [request.url]))
        page.goto(path or client.server.address)
        page.locator("#about dt").first.wait_for()
        return page

    yield open_page
    assert complaints == []
    for context in contexts:
        context.close()


def settle(page):
    """Wait until the model has done its work."""
    page.wait_for_timeout(150)
    page.locator("#work").wait_for(state="hidden")


def look(page, sentence, answer, subject=""):
    for name, text in (("sentence", sentence), ("answer", answer), ("subject", subject)):
        page.fill(f"#{name}", text)
    page.click("#look")
    settle(page)


@pytest.mark.checks
def test_a_fact_from_the_keyboard_to_the_journal_and_back(visit, client):
    page = visit(client)
    look(page, *FACT)
    assert page.inner_text("#seen-sentence mark") == "LeBron James"
    assert page.input_value("#subject") == "LeBron James"
    assert page.locator("#seen-tokens .written").count() == 1
    assert page.locator("#seen-checks li").count() == 7
    page.click("#preview")
    settle(page)
    assert page.inner_text("#outcome-kind") == "tried, and taken back"
    assert page.locator("#journal li").count() == 0
    page.click("#apply")
    settle(page)
    assert page.inner_text("#outcome-kind") == "applied, and in the journal"
    assert re.match(r"The model (states|does not state) it", page.inner_text("#outcome-verdict"))
    assert page.locator("#outcome-rows table").first.locator("tbody tr").count() == 1
    assert page.inner_text("#journal .fact") == " ".join(FACT)
    assert page.inner_text("#journal-count") == "1 in force"
    assert page.input_value("#sentence") == ""
    page.fill("#prompt", FACT[0])
    page.keyboard.press("Enter")
    settle(page)
    assert page.locator("#ask-rows .says > div").count() == 2
    page.click("#journal button")
    settle(page)
    assert page.inner_text("#journal .meta .chip") == "taken back"
    assert page.locator("#journal button").count() == 0
    assert FACT[0] in page.inner_text("#journal-note")


def test_what_was_not_looked_at_cannot_be_applied(visit, client):
    page = visit(client)
    look(page, *FACT)
    assert page.locator("#apply").is_enabled()
    page.fill("#answer", "chess")
    assert page.locator("#apply").is_disabled()
    assert page.inner_text("#seen-hint") == "The fact above has changed: look again."
    page.fill("#sentence", OTHER[0])
    assert page.input_value("#subject") == ""  # a guess belongs to its sentence


def test_a_fault_stands_at_its_field(visit, client, tmp_path):
    page = visit(client)
    files = content(tmp_path / "run")
    look(page, "it is", "")
    assert page.get_attribute("#subject", "aria-invalid") == "true"
    assert "no subject can be guessed" in page.inner_text("#subject-fault")
    assert "must not be empty" in page.inner_text("#answer-fault")
    assert page.evaluate("document.activeElement.id") == "subject"
    assert page.locator("#seen").is_hidden()
    assert content(tmp_path / "run") == files


def test_a_policy_is_named_and_shuts_the_buttons(visit, desk):
    with desk(trainer={"callbacks": [PolicyGuard(Policy(denied_subjects=("lebron",)))]}) as client:
        page = visit(client)
        assert "denied_subjects" in page.inner_text("#about")
        look(page, *FACT)
        assert "denied by 'lebron'" in page.inner_text("#seen-notes .alert")
        assert page.locator("#apply").is_disabled()


def test_what_is_typed_is_shown_and_never_obeyed(visit, client):
    page = visit(client)
    look(page, HOSTILE, "<script>alert(2)</script>", "Ann")
    assert page.inner_text("#seen-sentence") == f"{HOSTILE} <script>alert(2)</script>"
    page.click("#apply")
    settle(page)
    assert HOSTILE in page.inner_text("#journal .fact")
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1


def test_a_reload_and_a_second_window_show_the_same_journal(visit, client):
    page = visit(client)
    look(page, *FACT)
    page.click("#apply")
    settle(page)
    page.reload()
    page.locator("#journal li").wait_for()
    other = visit(client, client.server.address.replace("127.0.0.1", "localhost"))
    assert other.inner_text("#journal .fact") == page.inner_text("#journal .fact") == " ".join(FACT)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_cut_off(visit, client, scheme):
    page = visit(client, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    look(page, *FACT)
    page.click("#apply")
    settle(page)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    heights = (
        "[...document.querySelectorAll('button')].filter(each => each.offsetParent).map(each => each.offsetHeight)"
    )
    assert min(page.evaluate(heights)) >= 34
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert color == ("rgb(247, 247, 249)" if scheme == "light" else "rgb(20, 21, 27)")


def test_every_control_is_reached_by_keyboard_and_seen(visit, client):
    page = visit(client)
    look(page, *FACT)
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        identity, style = page.evaluate(
            "[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]"
        )
        if identity:
            assert style != "none", identity
        reached.append(identity)
    assert {"sentence", "answer", "subject", "look", "apply", "preview", "prompt"} <= {*reached}
