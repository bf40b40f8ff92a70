"""A model on the desk, with its run folder: facts are looked at, tried, applied, asked about and taken back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cakeflow.core.datamodule import EditDataModule
from cakeflow.core.folder import require_run_folder
from cakeflow.core.identity import run_body
from cakeflow.core.run import FitResult, go_on_from, update_outcome, write_files
from cakeflow.core.undo import require_last
from cakeflow.data.files import read_text
from cakeflow.data.proposals import propose
from cakeflow.data.request import EditRequest
from cakeflow.data.schemas import parse_requests
from cakeflow.data.subject import guess_subject
from cakeflow.desk.views import fact_view, journal_view, outcome_view, token_views
from cakeflow.editor import Editor, default_logger
from cakeflow.errors import ConfigError, Fault, RequestError, ResumeError, RunFolderError, command_line
from cakeflow.evaluation.outcome import Outcome, ask
from cakeflow.forward.tokens import EditBatch, TextBatch
from cakeflow.journal.ledger import Entry, bodies, read_entries
from cakeflow.journal.policy import HELD
from cakeflow.journal.schema import EndBody, FreeAnswer, PolicyBody, RunBody
from cakeflow.journal.steps import EditStep, facts_in_force, hashes_on_record
from cakeflow.journal.store import ANSWERS, ledger_path
from cakeflow.report.folder import RunFolder
from cakeflow.storage.folders import require_inside
from cakeflow.storage.locks import locked
from cakeflow.storage.typed import parse_lines

MOST_OTHERS = 100
"""Answers about other things than the facts, the latest, that are asked again behind every change."""
TOKENS = 24
"""Most tokens of an answer on the page."""
FACT = ("fact", "completion")
"""Topic and form of the answers that stand beside the facts of the journal."""


class Session:
    """Edits one model by hand; everything that lasts is in the journal of its run folder, as one run.

    Attributes:
        editor: The editor, whose journal is stored in the folder.
        folder: The run folder.
        answers: Form, topic and prompt -> the answer before the run's edits and the latest one.

    Args:
        editor: An editor whose Trainer has no logger: the ledger keeps what the page does.
        folder: The run folder, opened by ``opened``.
    """

    def __init__(self, editor: Editor, folder: Path) -> None:
        self.editor, self.folder = editor, folder
        self.journal, self.module = editor.journal, editor.module
        self.answers = _read_answers(folder / ANSWERS)

    @classmethod
    @contextmanager
    def opened(cls, editor: Editor, folder: Path | None = None, start: Path | None = None) -> Iterator[Session]:
        """Open a run folder, new or of an earlier session, and keep it to this thread while the body runs.

        Args:
            editor: The editor of the unedited model.
            folder: The folder; by default a new one, ``runs/cakeflow/version_N``.
            start: A finished run to go on from, whose edits stay; for a new folder.

        Raises:
            ConfigError: If the folder holds other files, or a run that is none of a page.
            ResumeError: If its run is of another model, or was made under a policy that is missing here.
            LockedError: If another process writes it.
        """
        entries = require_own_run(folder) if folder is not None else []
        if start is not None and entries:
            raise ConfigError(
                f"{folder} has a run already, which goes on by itself; leave out --from, or name a new folder"
            )
        if start is not None:
            go_on_from(start, editor.module, None)
        folder = folder or Path(default_logger().log_dir)
        with locked(ledger_path(folder)):
            if entries:
                _require_policies(folder, entries, editor)
                editor.load(folder)
                _note_start(editor, entries)
            else:
                editor.module.open_journal(folder, None, editor.trainer())
                for rule in editor.journal.policies.rules if start is not None else ():
                    editor.journal.policies.record(rule, HELD)  # its batches were loaded only because they keep it
            yield cls(editor, folder)

    # ---- what the page asks for ----

    def state(self) -> dict[str, Any]:
        """The model, the rules, and the journal as it is now."""
        store = self.journal.store
        entries = store.ledger.entries if store else []
        completions = {prompt: each for (topic, form, prompt), each in self.answers.items() if (topic, form) == FACT}
        return {
            "model": self.module.name,
            "layers": list(getattr(self.module, "layers", [])),
            "folder": str(self.folder),
            "chats": self.module.lm.chats,
            "records_texts": self.journal.texts,
            "policies": [rule.model_dump(mode="json", exclude_defaults=True) for rule in self.journal.policies.rules],
            "edits": self.journal.edits,
            "journal": journal_view(self.journal, entries, completions),
        }

    def look(self, sentence: str, answer: str, subject: str = "") -> dict[str, Any]:
        """Describe an edit without making it.

        Args:
            sentence: The sentence up to where its answer begins.
            answer: The new answer.
            subject: The subject; empty for a guess.

        Returns:
            The fact and its tokens, what the model says now, what policies have against it, doubts about it, and the
            facts in force that it would replace.

        Raises:
            RequestError: Naming what is wrong with the fact.
        """
        request = self.request(sentence, answer, subject)
        with collecting() as doubts:
            texts = self._checked(request)
        with self.journal.reverted():
            tokens = token_views(self.module, texts) if isinstance(texts, TextBatch) else []
        forms = {"completion": self.editor.ask(request.text, tokens=TOKENS)}
        if self.module.lm.chats:
            forms["chat"] = self.editor.ask(request.text, chat=True, tokens=TOKENS)
        earlier = [each for each in self._facts() if each.text == request.text]
        return {
            "fact": fact_view(request),
            "tokens": tokens,
            "answers": forms,
            "refusals": [str(each) for _, refusals in self._against(request) for each in refusals],
            "doubts": doubts,
            "earlier": [each.target_new for each in earlier],
        }

    def preview(self, sentence: str, answer: str, subject: str = "") -> dict[str, Any]:
        """Edit, measure, and take everything back; nothing is stored. Arguments and errors as for ``apply``."""
        request = self.request(sentence, answer, subject)
        with self.journal.rehearsal():
            return self._edit(request)[0]

    def apply(self, sentence: str, answer: str, subject: str = "") -> dict[str, Any]:
        """Edit a fact: one batch, on disk as a whole or not at all.

        Args:
            sentence: The sentence up to where its answer begins.
            answer: The new answer.
            subject: The subject; empty for a guess.

        Returns:
            The outcome, and warnings.

        Raises:
            RequestError: Naming what is wrong with the fact.
            PolicyError: If a policy does not allow it, or its outcome breaks one; the model is as before.
        """
        request = self.request(sentence, answer, subject)
        self.journal.policies.refuse(self._against(request))
        view, result = self._edit(request)
        self._write(result)
        return view

    def ask(self, prompt: str, chat: bool = False) -> dict[str, Any]:
        """The free answer to a prompt, and the one of the unedited model.

        Raises:
            RequestError: If the prompt is blank, or no valid text.
        """
        if not prompt.strip():
            raise RequestError([Fault(0, "prompt", prompt, "must not be empty or blank")])
        now = self.editor.ask(prompt, chat=chat, tokens=TOKENS)
        with self.editor.reverted():
            unedited = self.editor.ask(prompt, chat=chat, tokens=TOKENS) if self.journal.edits else now
        return {"prompt": prompt, "chat": chat, "now": now, "unedited": unedited}

    def undo(self, batch: int, place: int) -> dict[str, Any]:
        """Take back one fact; all others stay.

        A fact that is alone in its batch goes bit for bit, with its batch; one among others is walked back.

        Args:
            batch: Number of its batch.
            place: Its place there.

        Returns:
            Its prompt, the target that it had, and the answers before and after.

        Raises:
            ConfigError: If there is no such fact in force, or a later one has replaced it.
        """
        step = next((each for each in self.journal.steps if each.number == batch and place < len(each.hashes)), None)
        if step is None:
            raise ConfigError(f"batch {batch} has no fact {place} that could be taken back; reload the page")
        with collecting() as notes:
            rows = self._take_back(step, place)
            self._write()
        return {"rows": rows, "warnings": notes}

    # ---- the parts ----

    def request(self, sentence: str, answer: str, subject: str = "") -> EditRequest:
        """A fact as a request, with proposed checks.

        Raises:
            RequestError: Naming the field that is wrong.
        """
        name = subject.strip() or guess_subject(sentence)
        if name is None and sentence.strip():
            remedy = "no subject can be guessed; name it, as it stands in the sentence"
            empty = [] if answer.strip() else [Fault(0, "target_new", answer, "must not be empty or blank")]
            raise RequestError([Fault(0, "subject", subject, remedy), *empty])
        entry = {"prompt": sentence.strip(), "subject": name or "", "target_new": answer.strip()}
        (request,) = parse_requests([entry], occurrence="first")
        return propose(request)

    def _checked(self, request: EditRequest) -> EditBatch:
        """The request as the method encodes it, after all checks that an edit begins with."""
        data = EditDataModule([request])
        data.attach(self.module, edit=True, evaluate=True)
        batches: list[EditBatch] = list(data.train_dataloader())
        return batches[0]

    def _against(self, request: EditRequest) -> list[Any]:
        """What policies have against one more fact: the folder is one run, however often the page was opened."""
        return self.journal.policies.answers([request], earlier=len(hashes_on_record(self.journal.steps)))

    def _facts(self) -> list[EditRequest]:
        """The facts in force whose texts are there."""
        return [step.requests[i] for step, i in facts_in_force(self.journal.steps) if step.requests]

    def _edit(self, request: EditRequest) -> tuple[dict[str, Any], FitResult]:
        with collecting() as notes:
            result = self.editor.fit([request])
        outcome = outcome_view(result.outcome) if result.outcome else None
        metrics = {stage: dict(getattr(result, stage)) for stage in ("before", "after")}
        return {"fact": fact_view(request), "outcome": outcome, "metrics": metrics, "warnings": notes}, result

    def _take_back(self, step: EditStep, place: int) -> list[dict[str, str]]:
        require_last(self.journal, step, place, [(step, place)])
        if len(step.hashes) > 1:
            if not step.requests:
                raise ConfigError(
                    f"the texts of batch {step.number} were not stored, so it can only be taken back whole: "
                    + command_line(["rollback", str(self.folder), "--batch", str(step.number)])
                )
            return self.editor.take_back([(step, place)])
        prompts = [request.text for request in step.requests]
        before = self.editor.ask(prompts) if prompts else []
        self.editor.rollback(batch=step.number)
        after = self.editor.ask(prompts) if prompts else []
        targets = [request.target_new for request in step.requests]
        names = ("prompt", "target", "before", "after")
        return [dict(zip(names, row, strict=True)) for row in zip(prompts, targets, before, after, strict=True)]

    def _write(self, result: FitResult | None = None) -> None:
        """Ask again what was asked, and write answers and verdict, for reports and the next session; not without texts.

        Metrics are left out: each edit measures those of its own fact.

        Args:
            result: The edit that was made; None where a fact was taken back.
        """
        edited = result.outcome if result else None
        for each in edited.answers if edited else ():
            earlier = self.answers.get(_name(each))
            before = earlier.before if earlier else each.before
            self.answers[_name(each)] = each.model_copy(update={"before": before, "request": None})
        questions = self._questions()
        texts = ask(self.module.lm, questions, self.module.max_bytes, self.module.question)
        pairs = zip(questions, texts, strict=True)
        self.answers = {_name(each): each.model_copy(update={"after": text}) for each, text in pairs}
        if not self.journal.texts:
            return
        faults, condition = edited.side_effects if edited else (), self.module.condition
        outcome = Outcome([*self.answers.values()], side_effects=faults, condition=condition)
        if result or not (self.folder / "run.json").exists():
            self.module.outcome = outcome
            write_files(self.folder, self.module, self.journal.edits, {"before": {}, "after": {}})
        else:
            update_outcome(self.folder, RunFolder.read(self.folder).info, outcome, self.journal.edits)

    def _questions(self) -> list[FreeAnswer]:
        """What the verdict counts: the facts in force, with the targets that they have now, and other questions."""
        targets = {request.text: request.target_new for request in self._facts()}
        facts = [each for each in self.answers.values() if each.topic == "fact" and each.prompt in targets]
        others = [each for each in self.answers.values() if each.topic != "fact"][-MOST_OTHERS:] if targets else []
        return [each.model_copy(update={"expected": targets[each.prompt]}) for each in facts] + [
            each.model_copy(update={"edited": each.prompt in targets}) for each in others
        ]


def _name(answer: FreeAnswer) -> tuple[str, str, str]:
    return answer.topic, answer.form, answer.prompt


def _read_answers(path: Path) -> dict[tuple[str, str, str], FreeAnswer]:
    if not require_inside(path, path.parent).is_file():
        return {}
    remedy = "delete the file to do without earlier answers"
    answers = parse_lines(FreeAnswer, read_text(path), path, RunFolderError, remedy)
    return {_name(each): each for each in answers}


@contextmanager
def collecting() -> Iterator[list[str]]:
    """Collect the warnings of the body, each once, for the page."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield messages
        finally:
            own = (each for each in caught if each.category.__module__.startswith("cakeflow"))
            messages.extend(dict.fromkeys(str(each.message) for each in own))


def require_own_run(folder: Path) -> list[Entry]:
    """Check that a folder is new, empty, or has a run that a page made, and return its ledger.

    Raises:
        ConfigError: If it is another one: a finished run is never written on, and a run of many facts goes on by its
            own command.
        LedgerError: If the ledger was changed after it was written.
    """
    require_run_folder(folder)
    path = ledger_path(folder)
    entries = list(read_entries(path)) if path.exists() else []
    runs = bodies(entries, RunBody)
    if bodies(entries, EndBody):
        raise ConfigError(
            f"{folder} holds a finished run, which stays as it is; go on from it in another folder: --from {folder}"
        )
    if runs and runs[-1].edits:
        raise ConfigError(
            f"{folder} holds a run of `cakeflow fit` that was stopped; let its command end it, then go on from it in "
            "another folder: --from"
        )
    return entries


def _require_policies(folder: Path, entries: Sequence[Entry], editor: Editor) -> None:
    hashes = {body.policy for body in bodies(entries, PolicyBody)} - {
        rule.hash for rule in editor.journal.policies.rules
    }
    if hashes:
        names = ", ".join(sorted(each[:16] for each in hashes))
        raise ResumeError(
            f"{folder} was edited under the policy with the hash {names}; give that policy, unchanged: --policy FILE"
        )


def _note_start(editor: Editor, entries: Sequence[Entry]) -> None:
    """Note in the ledger who goes on, and with what, if that has changed."""
    run, store = run_body(editor.module, None, editor.trainer()), editor.journal.store
    last = bodies(entries, RunBody)[-1:]
    if store is not None and [each.to_dict() for each in last] != [run.to_dict()]:
        store.note(run)
