"""The calls of the page: what it may send, and the job that each of them becomes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from cakeflow.desk.server import Call, DeskServer
from cakeflow.desk.session import Session
from cakeflow.desk.work import Worker
from cakeflow.errors import ConfigError
from cakeflow.storage.typed import Count, S, Schema, parse_as, plain


class FactForm(Schema):
    """A fact as it was typed; an empty subject is guessed."""

    sentence: str
    answer: str
    subject: str = ""


class FactPlace(Schema):
    """A fact of the journal: number of its batch, and its place there."""

    batch: Count
    place: Count


class Question(Schema):
    """A prompt to be continued, or asked as the user's turn of a chat."""

    prompt: str
    chat: bool = False


class JobNumber(Schema):
    """A job that was handed in."""

    job: Count


class Nothing(Schema):
    """A call without arguments."""


class Calls:
    """Calls of the page; whatever needs the model becomes a job of the worker.

    Attributes:
        state: The session as it was behind the last job: other threads read nothing else of it.

    Args:
        session: The session, which belongs to the worker's thread.
        worker: The worker.
    """

    def __init__(self, session: Session, worker: Worker) -> None:
        self.session, self.worker = session, worker
        self.state: dict[str, Any] = plain(session.state())

    def by_name(self) -> dict[str, Call]:
        """Name -> call, for the server."""
        session = self.session
        return {
            "state": self._direct(Nothing, lambda _: {"state": self.state, "job": self.worker.busy}),
            "job": self._direct(JobNumber, self._view),
            "look": self._job(FactForm, "looking at a fact", lambda form: session.look(**form.model_dump())),
            "preview": self._job(FactForm, "trying an edit", lambda form: session.preview(**form.model_dump())),
            "apply": self._job(FactForm, "editing", lambda form: session.apply(**form.model_dump())),
            "ask": self._job(Question, "asking", lambda form: session.ask(**form.model_dump())),
            "undo": self._job(FactPlace, "taking a fact back", lambda form: session.undo(**form.model_dump())),
        }

    def _direct(self, kind: type[S], make: Callable[[S], dict[str, Any]]) -> Call:
        return lambda body: make(parse_as(kind, body, "call", ConfigError, "reload the page"))

    def _job(self, kind: type[S], title: str, make: Callable[[S], Any]) -> Call:
        def submit(form: S) -> dict[str, Any]:
            return {"job": self.worker.submit(title, lambda: self._work(form, make))}

        return self._direct(kind, submit)

    def _work(self, form: S, make: Callable[[S], Any]) -> Any:
        try:
            return plain(make(form))
        finally:
            self.state = plain(self.session.state())

    def _view(self, form: JobNumber) -> dict[str, Any]:
        view = self.worker.view(form.job)
        if view is None:
            raise ConfigError(f"there is no job {form.job} any more; reload the page")
        return {"job": view}


def serve(worker: Worker, server: DeskServer) -> None:
    """Serve the page in a thread of its own, and do its jobs in this one, until the worker is closed or interrupted."""
    thread = threading.Thread(target=server.serve_forever, name="cakeflow desk", daemon=True)
    thread.start()
    try:
        worker.run()
    finally:
        server.shutdown()
        thread.join()
