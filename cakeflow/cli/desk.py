"""``cakeflow desk``: a page on this machine to edit facts by hand."""

from __future__ import annotations

from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from cakeflow.callbacks import PolicyGuard
from cakeflow.cli.console import say
from cakeflow.cli.editors import editor_for
from cakeflow.cli.loading import loading_words
from cakeflow.cli.words import words_of
from cakeflow.core.config_parser import import_words
from cakeflow.desk import DeskServer, Session, Worker
from cakeflow.desk.calls import Calls, serve
from cakeflow.desk.session import require_own_run
from cakeflow.desk.work import PhaseProfiler
from cakeflow.errors import command_line, require_count
from cakeflow.journal.audit import entries_of
from cakeflow.models.loading import Loading

PORT = 8750


def run_desk(
    run_dir: Path | None = None,
    from_run: Path | None = None,
    model: str | None = None,
    method: str | None = None,
    model_config: str | None = None,
    layers: list[int] | None = None,
    policy: Path | None = None,
    record_texts: bool | None = None,
    port: int = PORT,
    loading: Loading = Loading(),
) -> Path:
    """Open a local page to edit facts by hand: type a fact, look at it, try it, apply it, take it back.

    Only this machine reaches the page, by the address with the token that is shown. Ctrl-C ends it; the same command
    with its --run_dir goes on.

    Args:
        run_dir: Run folder, new or of an earlier page; by default a new one.
        from_run: Finished run to go on from; its edits stay.
        model: Name, hub id, folder or GGUF file; by default the run's.
        method: A shipped recipe or a YAML file; by default the run's, else cake.
        model_config: Tuned numbers for the model, by name or YAML file.
        layers: Layers to edit, for a model without them.
        policy: YAML file of a policy: what it forbids is refused or undone.
        record_texts: Whether the run folder has the texts of the facts; by default as the run, else yes.
        port: Port of the page; 0 takes any that is free.
        loading: --loading.NAME, how a model is loaded.

    Raises:
        ConfigError: If the port is in use, or the folder holds another run.
        ResumeError: If the folder's run is of another model or policy.
        LockedError: If another process writes the folder.
    """
    require_count("port", port)
    worker = Worker()
    rules = [PolicyGuard(str(policy))] if policy else []
    entries = require_own_run(run_dir) if run_dir else []
    with closing(DeskServer(port)) as server:  # before anything is loaded or written
        trainer: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "callbacks": rules}
        editor = editor_for(
            entries or (entries_of(from_run) if from_run else []),
            model,
            method,
            model_config,
            layers,
            loading,
            {**trainer, "profiler": PhaseProfiler(worker.step)},
            **({} if record_texts is None else {"record_texts": record_texts}),
        )
        with Session.opened(editor, run_dir, from_run) as session:
            server.calls = Calls(session, worker).by_name()
            say(f"open {server.address}")
            say("only this machine reaches it, and only with this address; Ctrl-C ends it")
            with suppress(KeyboardInterrupt):
                serve(worker, server)
            say(f"closed with {editor.journal.edits} facts in force")
            words = [*words_of({"run_dir": session.folder, "policy": policy}), *loading_words(loading)]
            say(f"go on with: {command_line(['desk', *import_words(editor.module.method), *words])}")
    return session.folder
