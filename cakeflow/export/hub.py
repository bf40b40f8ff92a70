"""An export on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from cakeflow.errors import ConfigError, ExportError
from cakeflow.export.formats import export
from cakeflow.export.manifest import FROM_A_COPY, MANIFEST, Format, Manifest
from cakeflow.export.options import ExportOptions
from cakeflow.journal.journal import Journal
from cakeflow.storage.hashing import file_hash


def require_repo(repo: str) -> str:
    """Return the id of a repository, if the hub could have one of that name.

    Raises:
        ConfigError: If not.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"push_to_hub={repo!r}: {error}; give an id such as OWNER/NAME") from error
    return repo


def push_to_hub(folder: str | Path, repo: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Upload an export, which has to be as it was written, in one commit; the repository is made if there is none.

    Args:
        folder: The export.
        repo: Id of the repository, ``OWNER/NAME``.
        private: Whether a new repository is private; None for the owner's default.
        token: Access token; None for the one that ``hf auth login`` stored. It is written nowhere.

    Returns:
        Address of the commit.

    Raises:
        ConfigError: If the hub could have no repository of that name.
        ExportError: If a file is not the one that the manifest names, or the hub refuses.
    """
    require_repo(repo)
    folder = Path(folder)
    manifest = Manifest.read(folder)
    for name, expected in manifest.files.items():
        if not (folder / name).is_file() or file_hash(folder / name) != expected:
            raise ExportError(f"{folder / name} is not the file that {MANIFEST} names; {FROM_A_COPY}, or export again")
    api = HfApi(token=token)
    text = f"{manifest.edits} facts edited in {manifest.model!a}, as {manifest.format} (cakeflow)"
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=text))
    except (HfHubHTTPError, OSError) as error:
        raise ExportError(
            f"{repo} was not written: {error}; is there a connection, and a token that may write there "
            "(hf auth login, or token=...)? The export is complete, push it again"
        ) from error


def export_to_hub(
    journal: Journal,
    repo: str,
    format: Format = "model",
    *,
    private: bool | None = None,
    token: str | None = None,
    **options: Any,
) -> str:
    """Export the model as the journal has it now, and upload it.

    Args:
        journal: Journal of the edited model.
        repo: As for ``push_to_hub``, which also has ``private`` and ``token``.
        format: As for ``export``.
        private: Whether a new repository is private.
        token: Access token.
        options: Fields of ``ExportOptions``.

    Returns:
        Address of the commit.

    Raises:
        ConfigError: If the hub could have no repository of that name; nothing was written.
        ExportError: As for ``export`` and ``push_to_hub``.
    """
    require_repo(repo)
    with TemporaryDirectory() as folder:
        place = export(journal, Path(folder) / "export", format, options=ExportOptions(**options))
        return push_to_hub(place, repo, private=private, token=token)
