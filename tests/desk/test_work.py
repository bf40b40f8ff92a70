"""One job at a time, and what others see of it."""

import threading
import time

import pytest

from cakeflow.desk import Worker
from cakeflow.desk.work import MOST_JOBS, PHASES, PhaseProfiler
from cakeflow.errors import ConfigError, Fault, LockedError, RequestError


@pytest.fixture
def worker():
    each = Worker()
    thread = threading.Thread(target=each.run)
    thread.start()
    yield each
    each.close()
    thread.join(10)


def ended(worker, number):
    while (view := worker.view(number))["state"] not in ("done", "failed"):
        time.sleep(0.01)
    return view


def test_a_second_job_waits_for_its_turn(worker):
    go = threading.Event()
    first = worker.submit("thinking", lambda: go.wait(10))
    assert worker.busy == first
    with pytest.raises(LockedError, match=r"the model is at work \(thinking\)"):
        worker.submit("talking", list)
    go.set()
    assert ended(worker, first)["result"] is True
    assert ended(worker, worker.submit("talking", lambda: [1]))["result"] == [1]
    assert worker.busy is None


def test_a_failure_is_typed_and_the_next_job_is_done(worker, caplog):
    def fail(error):
        def call():
            raise error

        return ended(worker, worker.submit("failing", call))

    view = fail(ConfigError("no such thing"))
    assert (view["state"], view["result"]) == ("failed", None)
    assert view["error"] == {"kind": "ConfigError", "message": "no such thing", "fields": []}
    view = fail(RequestError([Fault(0, "subject", "", "name it")]))
    assert view["error"]["fields"] == [{"field": "subject", "remedy": "name it"}]
    assert caplog.records == []
    view = fail(ZeroDivisionError("by zero"))
    assert view["error"]["message"] == "by zero; the terminal has the details"
    assert "Traceback" not in str(view)
    assert caplog.records[0].exc_info is not None
    assert ended(worker, worker.submit("going on", lambda: 1))["result"] == 1


def test_steps_are_counted_and_those_outside_a_job_dropped(worker):
    profiler = PhaseProfiler(worker.step)
    profiler.start("cakeflow/keys")

    def call():
        for action in ("cakeflow/keys", "cakeflow/solve", "cakeflow/solve", "run_training_epoch", "cakeflow/other"):
            with profiler.profile(action):
                pass

    steps = ended(worker, worker.submit("editing", call))["steps"]
    assert steps == [{"words": PHASES["keys"], "times": 1}, {"words": PHASES["solve"], "times": 2}]
    assert profiler.summary() == ""


def test_an_interrupt_ends_the_worker_and_its_job():
    worker = Worker()

    def call():
        raise KeyboardInterrupt

    number = worker.submit("editing", call)
    with pytest.raises(KeyboardInterrupt):
        worker.run()
    assert worker.view(number)["error"]["kind"] == "Interrupt"
    with pytest.raises(LockedError, match="closed in its terminal"):
        worker.submit("editing", list)


def test_old_jobs_are_forgotten(worker):
    numbers = [ended(worker, worker.submit("a job", list))["number"] for _ in range(MOST_JOBS + 1)]
    assert worker.view(numbers[0]) is None
    assert worker.view(numbers[-1]) is not None
