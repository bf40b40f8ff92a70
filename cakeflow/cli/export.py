"""The commands ``cakeflow export`` and ``cakeflow apply``."""

from __future__ import annotations

from pathlib import Path

from cakeflow.cli.console import say
from cakeflow.export.delta import apply_delta
from cakeflow.export.formats import export, export_applied
from cakeflow.export.hub import push_to_hub as upload
from cakeflow.export.hub import require_repo
from cakeflow.export.manifest import Format, Manifest, require_place
from cakeflow.export.options import ExportOptions
from cakeflow.export.signing import require_key, require_signature
from cakeflow.export.signing import sign as sign_export
from cakeflow.journal.audit import replay
from cakeflow.journal.policy import Policy
from cakeflow.models.loading import Loading, load_editable


def run_export(
    run: Path,
    out: Path,
    format: Format = "model",
    model: str | None = None,
    overwrite: bool = False,
    policy: Path | None = None,
    options: ExportOptions = ExportOptions(),
    loading: Loading = Loading(),
    sign: Path | None = None,
    push_to_hub: str | None = None,
    private: bool = True,
) -> Path:
    """Export the edited model of a run: whole, its changes alone, or as an adapter.

    Args:
        run: A run folder.
        out: Folder for the export.
        format: ``model``; ``delta``, for ``cakeflow apply``; ``lora``, for PEFT; ``gguf``, for llama.cpp and Ollama; or
            ``memory``, for runs that put modules in place.
        model: Name or folder of the base model, if that has moved.
        overwrite: Replace an export.
        policy: YAML file of a policy that the run must keep, beside its own.
        options: How numbers are stored, and what the export is to fit.
        loading: --loading.NAME, how a model is loaded.
        sign: Private key (PEM, elliptic curve) to sign it with.
        push_to_hub: Upload it as well, to OWNER/NAME.
        private: Whether a new repository is private.

    Raises:
        ConfigError: If something is in the way, or the hub could have no such repository.
        RunFolderError: If the folder is not a run folder, or its ledger is damaged.
        ResumeError: If the model is another one, or the edits give other weights on this machine.
        ExportError: If the format cannot hold the run's edits, such as edits of full rank in ``lora``.
        PolicyError: If the run breaks the policy, or its own has not judged it.
    """
    require_place(out, overwrite=overwrite)
    repo = require_repo(push_to_hub) if push_to_hub else ""
    if sign:
        require_key(sign)
    journal = replay(run, model, _policies(policy), loading=loading)
    place = export(journal, out, format, overwrite=overwrite, options=options)
    say(f"written to {place}")
    if sign:
        say(f"signed: {sign_export(place, sign)}")
    if repo:
        say(f"uploaded: {upload(place, repo, private=private, token=loading.token)}")
    return place


def run_apply(
    delta: Path,
    model: str,
    out: Path,
    overwrite: bool = False,
    policy: Path | None = None,
    loading: Loading = Loading(),
    key: Path | None = None,
) -> Path:
    """Apply a delta to the model that it was made from, and write the edited model.

    Args:
        delta: A folder that ``cakeflow export --format delta`` wrote.
        model: The base model: an embedded name, a hub id, a folder or a GGUF file.
        out: Folder for the edited model.
        overwrite: Replace an existing export.
        policy: YAML file of a policy that must allow it; rules about subjects and metrics allow no delta.
        loading: --loading.NAME, how a model is loaded.
        key: Public key (PEM) of whoever must have signed the delta.

    Raises:
        ExportError: If the model is another one, or the delta was changed, or not signed by this key.
        PolicyError: If the policy forbids it.
    """
    if key:
        require_signature(delta, key)
    dtype = Manifest.read(delta).dtype.removeprefix("torch.")
    require_place(out, overwrite=overwrite)
    policies = _policies(policy)
    lm = load_editable(model, **{"dtype": dtype, **loading.arguments()})
    place = export_applied(lm, apply_delta(lm, delta, policies), out, overwrite=overwrite)
    say(f"written to {place}")
    return place


def _policies(path: Path | None) -> list[Policy]:
    return [Policy.read(path)] if path else []
