"""Pre-trained models from the model hub, downloaded whole and checked against the hashes of their files."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from tqdm import tqdm

from partial_lora import progress
from partial_lora.cache import file_sha256
from partial_lora.errors import PartialLoraError

OFFLINE_MODEL = "vit_s14"  # what a message recommends to who cannot reach the hub
_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json"]  # never a pickle
_SHA256 = re.compile(r"[0-9a-f]{64}")

logger = logging.getLogger(__name__)


class _Events(tqdm):
    """The hub's progress bars, told to `progress` in place of the terminal."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **{**kwargs, "file": io.StringIO()})

    def display(self, *args: object, **kwargs: object) -> None:
        if self.unit == "B" and self.total:
            progress.emit("download", min(int(self.n), int(self.total)), int(self.total))


def fetch_model(repo: str, *, name: str) -> Path:
    """The folder with a repository's config and weights; what the hub's own cache holds is not downloaded again.

    A weight file whose content is not what its hash says is named, removed and downloaded again. Raises
    PartialLoraError that names the model, the repository and the model that needs no hub.
    """
    folder = _download(repo, name)
    broken = _broken_files(folder)
    if broken:
        for file in broken:
            logger.warning("%s in the hub's cache is broken: it is removed and downloaded again", file)
            file.resolve().unlink()
            file.unlink()
        folder = _download(repo, name)
        for file in _broken_files(folder):
            raise PartialLoraError(
                f"model={name}: {repo} was downloaded twice and {file.name} is broken; try again later"
            )
    return folder


def _download(repo: str, name: str) -> Path:
    try:
        return Path(snapshot_download(repo, allow_patterns=_FILES, tqdm_class=_Events))
    except (OSError, HFValidationError, HTTPError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        reason = "no such repository, or no access to it" if isinstance(error, RepositoryNotFoundError) else first_line
        raise PartialLoraError(
            f"model={name}: cannot download {repo} from the model hub ({reason or type(error).__name__}); check the "
            f"connection and the repository's name, or use model={OFFLINE_MODEL}, which needs no hub"
        ) from error


def _broken_files(folder: Path) -> list[Path]:
    """Weight files whose SHA-256 is not their name in the cache, where large files are stored under their hash."""
    return [
        file
        for file in sorted(folder.glob("*.safetensors"))
        if _SHA256.fullmatch(file.resolve().name) and file_sha256(file) != file.resolve().name
    ]
