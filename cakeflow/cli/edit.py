"""``cakeflow edit``: facts as sentences, one command from the sentence to the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cakeflow.callbacks import PolicyGuard
from cakeflow.cli.console import say
from cakeflow.cli.editors import editor_for
from cakeflow.cli.loading import loading_words
from cakeflow.cli.result import require_clean, show_fit
from cakeflow.cli.words import words_of
from cakeflow.core.config_parser import import_words
from cakeflow.core.datamodule import EditDataModule
from cakeflow.core.run import FitResult, go_on_from, run_fit
from cakeflow.data.proposals import propose
from cakeflow.data.request import EditRequest
from cakeflow.data.schemas import parse_requests
from cakeflow.data.sources import read_entries
from cakeflow.data.subject import guess_subject
from cakeflow.errors import ConfigError, Fault, command_line, counted
from cakeflow.journal.audit import entries_of, ledger_of
from cakeflow.models.loading import Loading
from cakeflow.report.tables import requests_table, rows_table
from cakeflow.storage.locks import locked

REMEDY = "no subject can be guessed; name it: --subject NAME"


def run_edit(
    texts: list[str],
    file: Path | None = None,
    subject: str | list[str] | None = None,
    model: str | None = None,
    method: str | None = None,
    model_config: str | None = None,
    layers: list[int] | None = None,
    run_dir: Path | None = None,
    from_run: Path | None = None,
    dry_run: bool = False,
    strict: bool = False,
    budget: Path | None = None,
    loading: Loading = Loading(),
) -> FitResult:
    """Edit facts given as sentences: cakeflow edit "LeBron James plays the sport of" "tennis".

    Subjects are guessed and shown; wordings and neighbors to check are proposed.

    Args:
        texts: Sentences up to where the answer begins, each followed by its new answer.
        file: Facts in a file instead; a subject may be missing there.
        subject: Subject, where the guess is wrong; of several sentences a list.
        model: An embedded name, a hub id, a folder or a GGUF file; by default smollm2-135m, or that of --from.
        method: A shipped recipe or a YAML file; by default cake, or that of --from.
        model_config: Tuned numbers for the model, by name or as a YAML file.
        layers: Layers to edit, for a model without them.
        run_dir: Run folder; by default a new one under runs/.
        from_run: Finished run to go on from; its edits stay.
        dry_run: Edit, report and take everything back.
        strict: Exit status 1 unless every fact was learned, within the budget.
        budget: YAML file of a policy; a run that breaks it is taken back.
        loading: --loading.NAME, how a model is loaded.

    Raises:
        ConfigError: If a sentence has no answer, or no subject can be guessed.
        RequestError: Listing every bad request; the model is not touched.
        PolicyError: If the budget was broken.
    """
    requests = [
        propose(request) for request in _requests(texts, file, [subject] if isinstance(subject, str) else subject)
    ]
    Console().print(requests_table(requests))
    trainer: dict[str, Any] = {"callbacks": [PolicyGuard(str(budget))] if budget else []}
    if dry_run:
        if run_dir is not None:
            raise ConfigError(f"--dry_run stores nothing; leave out --run_dir {run_dir}")
        trainer["logger"] = False
    entries = entries_of(from_run) if from_run is not None else []
    editor = editor_for(entries, model, method, model_config, layers, loading, trainer)
    if from_run is not None:
        go_on_from(from_run, editor.module, run_dir)
    given: dict[str, object] = {
        "file": file,
        "subject": subject,
        "model": model,
        "method": method,
        "model_config": model_config,
    }
    given |= {"layers": layers, "from": from_run, "strict": strict, "budget": budget}
    words = ["edit", *import_words(editor.module.method), *texts, *words_of(given), *loading_words(loading)]

    def again(folder: Path) -> str:
        return command_line([*words, "--run_dir", str(folder)])

    result = run_fit(editor.trainer(run_dir, checks=True), editor.module, EditDataModule(requests), goes_on=again)
    show_fit(result)
    if dry_run:
        editor.rollback(1)
        say("dry run: the edit was taken back, and nothing was stored")
    if strict:
        require_clean(result)
    return result


def run_undo(
    run: Path,
    name: str,
    model: str | None = None,
    method: str | None = None,
    model_config: str | None = None,
    layers: list[int] | None = None,
    loading: Loading = Loading(),
) -> list[dict[str, str]]:
    """Take back single facts of a run, also from inside a batch: cakeflow undo RUN "LeBron James".

    The fact is walked back to the value that it would have without its batch; the ledger notes it as a batch.

    Args:
        run: A run folder.
        name: A subject, or a sentence with its subject.
        model: The unedited model, if it cannot be loaded by the name that the run was started with.
        method: A recipe or a YAML file, whose solver is used; by default the run's own.
        model_config: Tuned numbers for the model, by name or as a YAML file.
        layers: Layers to change, for a model without them.
        loading: --loading.NAME, how a model is loaded.

    Raises:
        ConfigError: If no fact in force is that, or a solver's last step allows whole batches only.
        ResumeError: If the model is another one, or a batch leads to other weights.
        LockedError: If another process is writing the run.
    """
    with locked(ledger_of(run)):
        editor = editor_for(entries_of(run), model, method, model_config, layers, loading)
        editor.load(run)
        rows = editor.undo(name)
    Console().print(rows_table(rows, "Taken back"))
    say(f"{run}: {counted(len(rows), 'fact')} taken back, {editor.journal.edits} remain")
    return rows


def _requests(texts: Sequence[str], file: Path | None, subjects: Sequence[str] | None) -> list[EditRequest]:
    """Return the facts, with guessed subjects where none is named."""
    if bool(texts) == bool(file):
        raise ConfigError("give sentences and their new answers, or --file FILE: one of them")
    if len(texts) % 2:
        raise ConfigError(f"{len(texts)} texts are no pairs of a sentence and its new answer; {texts[-1]!r} is alone")
    pairs = zip(texts[::2], texts[1::2], strict=True)
    entries = read_entries(str(file)) if file else [{"prompt": text, "target_new": target} for text, target in pairs]
    if subjects and len(subjects) != len(entries):
        raise ConfigError(
            f"{len(subjects)} subjects for {len(entries)} facts; give --subject '[...]' with one for each"
        )
    return parse_requests(list(_with_subjects(entries, subjects)), occurrence="first")


def _with_subjects(entries: Sequence[Any], subjects: Sequence[str] | None) -> Iterator[Any]:
    for place, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or (entry.get("subject") and not subjects) or "prompt" not in entry:
            yield entry
            continue
        name = subjects[place] if subjects else guess_subject(str(entry["prompt"]))
        if name is None:
            raise ConfigError(str(Fault(place, "prompt", entry["prompt"], REMEDY)))
        yield {**entry, "subject": name}
