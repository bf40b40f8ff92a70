"""A tiny model on a desk: sessions, and the page over HTTP."""

from __future__ import annotations

import copy
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import editor_of

from cakeflow.desk import DeskServer, Session, Worker
from cakeflow.desk.calls import Calls, serve
from cakeflow.desk.server import HEADER
from cakeflow.desk.work import PhaseProfiler
from cakeflow.models.language import LanguageModel

FACT = ("LeBron James plays the sport of", "tennis")
OTHER = ("Google was founded by", "Newton")


@pytest.fixture
def opened(lm: LanguageModel, tmp_path: Path) -> Callable[..., Any]:
    """Opens sessions, each on the unedited model; ``opened(folder, callbacks=[...], **arguments)``."""
    unedited = copy.deepcopy(lm)

    def open_session(folder: Path | None = None, start: Path | None = None, trainer: Any = None, **changes: Any) -> Any:
        editor = editor_of(copy.deepcopy(unedited), {"logger": False, **(trainer or {})}, **changes)
        return Session.opened(editor, folder or tmp_path / "run", start)

    return open_session


class Client:
    """A page as seen by ``http.client``.

    Attributes:
        server: The server.
        token: The token that calls send.
    """

    def __init__(self, server: DeskServer) -> None:
        self.server, self.token = server, server.token

    def send(self, method: str, path: str, body: Any = None, **headers: Any) -> tuple[int, Any, Any]:
        """Status, headers and body of an answer; a header of None is left out."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=30)
        usual = {"Content-Type": "application/json", HEADER: self.token, "Host": self.server.hosts[0]}
        chosen = {**usual, **{name.replace("_", "-"): value for name, value in headers.items()}}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if method == "POST":
            chosen.setdefault("Content-Length", str(len(data)))
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in chosen.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(data if method == "POST" else None)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        is_json = answer.getheader("Content-Type") == "application/json"
        return answer.status, answer, json.loads(text) if is_json else text.decode()

    def call(self, verb: str, **arguments: Any) -> Any:
        """The answer of a call."""
        return self.send("POST", f"/api/{verb}", arguments)[2]

    def job(self, verb: str, **arguments: Any) -> Any:
        """The job of a call, once it has ended."""
        answer = self.call(verb, **arguments)
        assert "job" in answer, answer
        job = {"state": ""}
        while job["state"] not in ("done", "failed"):
            job = self.call("job", job=answer["job"])["job"]
        return job


@contextmanager
def serving(open_session: Callable[[Worker], Any]) -> Iterator[Client]:
    """Serves a session in a thread that has model and lock, as the command's main thread has."""
    worker, server = Worker(), DeskServer(0)
    ready = threading.Event()

    def work() -> None:
        with open_session(worker) as session:
            server.calls = Calls(session, worker).by_name()
            ready.set()
            serve(worker, server)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert ready.wait(60)
        yield Client(server)
    finally:
        worker.close()
        thread.join(60)
        server.close()


@pytest.fixture
def desk(opened: Callable[..., Any]) -> Callable[..., Any]:
    """Serves a session of the tiny model; arguments as for ``opened``."""

    def open_desk(*arguments: Any, trainer: Any = None, **changes: Any) -> Any:
        def with_progress(worker: Worker) -> Any:
            profiler = {"profiler": PhaseProfiler(worker.step)}
            return opened(*arguments, trainer={**profiler, **(trainer or {})}, **changes)

        return serving(with_progress)

    return open_desk


@pytest.fixture
def client(desk: Callable[..., Any]) -> Iterator[Client]:
    """The page of a new run."""
    with desk() as page:
        yield page
