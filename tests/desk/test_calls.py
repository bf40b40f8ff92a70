"""The page's calls over HTTP, with the model behind them."""

import pytest
from tiny_runs import content

from cakeflow.callbacks import PolicyGuard
from cakeflow.journal import Policy, verify

from .conftest import FACT, OTHER


def form(fact):
    return dict(zip(("sentence", "answer"), fact, strict=True))


def test_from_a_look_to_an_undo(client, tmp_path):
    view = client.call("state")
    assert (view["job"], view["state"]["journal"]) == (None, [])
    job = client.job("look", **form(FACT))
    assert job["result"]["fact"]["subject"] == "LeBron James"
    job = client.job("apply", **form(FACT))
    assert job["state"] == "done"
    assert "Searching the value of the fact" in [step["words"] for step in job["steps"]]
    (row,) = client.call("state")["state"]["journal"]
    assert (row["text"], row["target"], row["state"]) == (*FACT, "in force")
    job = client.job("ask", prompt=FACT[0])
    assert job["result"]["prompt"] == FACT[0]
    job = client.job("undo", batch=row["batch"], place=row["place"])
    assert job["result"]["rows"][0]["target"] == "tennis"
    assert client.call("state")["state"]["edits"] == 0
    assert verify(tmp_path / "run").faults == []


def test_a_fault_in_the_fact_names_its_field(client, tmp_path):
    files = content(tmp_path / "run")
    job = client.job("apply", sentence="it is", answer=" ")
    assert job["error"]["kind"] == "RequestError"
    assert [each["field"] for each in job["error"]["fields"]] == ["subject", "target_new"]
    assert content(tmp_path / "run") == files


@pytest.mark.parametrize("prompt", ["", " ", "\ud800", "a b " * 5000, "\0"])
def test_a_prompt_that_cannot_be_asked_is_a_typed_error_or_has_an_answer(client, prompt):
    job = client.job("ask", prompt=prompt)
    assert job["state"] == "done" or job["error"]["kind"].endswith("Error"), job
    assert "terminal" not in str(job["error"])
    assert (job["state"] == "failed") == (prompt in ("", " ", "\ud800", "a b " * 5000))


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("look", {}),
        ("look", {"sentence": 1, "answer": "x"}),
        ("look", {"sentence": "a", "answer": "b", "extra": 1}),
        ("look", [1]),
        ("undo", {"batch": -1, "place": 0}),
        ("undo", {"batch": True, "place": 0}),
        ("job", {"job": 999}),
        ("state", {"x": 1}),
        ("ask", b"{"),
        ("ask", b"[" * 60000),
        ("ask", b"\xff"),
    ],
)
def test_a_call_of_another_form_is_a_typed_error(client, verb, arguments):
    status, _, answer = client.send("POST", f"/api/{verb}", arguments)
    assert status == 400
    assert answer["error"]["kind"] == "ConfigError"
    assert "reload the page" in answer["error"]["message"]


def test_a_policy_refuses_on_the_page(desk):
    trainer = {"callbacks": [PolicyGuard(Policy(denied_subjects=("lebron",)))]}
    with desk(trainer=trainer) as client:
        assert client.job("look", **form(FACT))["result"]["refusals"]
        job = client.job("apply", **form(FACT))
        assert (job["state"], job["error"]["kind"]) == ("failed", "PolicyError")
        assert "denied by 'lebron'" in job["error"]["message"]
        assert client.job("apply", **form(OTHER))["state"] == "done"


def test_closed_and_opened_again_it_goes_on(desk):
    with desk() as client:
        client.job("apply", **form(FACT))
        before = client.call("state")["state"]
    with desk() as client:
        assert client.call("state")["state"] == before
        assert client.job("undo", batch=0, place=0)["state"] == "done"


def test_a_batch_that_fails_is_not_there(desk, tmp_path, monkeypatch):
    with desk() as client:
        files = content(tmp_path / "run")
        monkeypatch.setattr(
            "cakeflow.journal.store.write_tensors", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
        )
        job = client.job("apply", **form(FACT))
        assert job["error"] == {"kind": "OSError", "message": "disk full; the terminal has the details", "fields": []}
        assert client.call("state")["state"]["journal"] == []
        monkeypatch.undo()
        assert not {*content(tmp_path / "run")} - {*files}
        assert client.job("apply", **form(FACT))["state"] == "done"
    assert verify(tmp_path / "run").faults == []
