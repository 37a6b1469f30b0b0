"""A finished run as a repository of the model hub: its adapter, the settings that made it and a page on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from partial_lora.credentials import redacted
from partial_lora.errors import PartialLoraError, one_line
from partial_lora.files import building, written
from partial_lora.finished.run import FinishedRun
from partial_lora.launching import directory
from partial_lora.settings.versions import as_yaml, plain, without_places


def check(repo: str) -> None:
    """Raise PartialLoraError for what is no OWNER/NAME of a repository."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PartialLoraError(f"{repo}: expected OWNER/NAME ({one_line(error)})") from None
    if repo.count("/") != 1:
        raise PartialLoraError(f"{repo}: expected OWNER/NAME")


def write(run: FinishedRun, card: Callable[[Path], ModelCard], *, compact: bool = False) -> Path:
    """Write what a repository holds into RUN_DIR/export/hub, in place of what was there, and return that folder.

    card: makes the page of a folder that has all the rest.
    """
    from partial_lora.finished import export  # imports torch, which a wrong argument does not wait for

    folder = run.directory.resolve() / "export" / "hub"
    with written(folder, "make room there"), building(folder) as built:
        export.WRITE["compact" if compact else "peft"](run, built)
        (built / directory.CONFIG).write_text(as_yaml(without_places(plain(run.config))), encoding="utf-8")
        card(built).save(built / "README.md")
    return folder


def upload(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder to a repository, made if need be, by the token that huggingface_hub finds; return its address.

    Raises PartialLoraError, in one line, where there is no token, no network, or the hub refuses.
    """
    api = HfApi()
    try:
        repository = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            commit_message="Upload by partial-lora push",
            delete_patterns=["adapter_*", "partial_lora*"],  # of an earlier push, perhaps in another form
        )
    except (HTTPError, OSError) as error:
        reason = redacted(one_line(error))
        raise PartialLoraError(
            f"{repo}: cannot be written to {api.endpoint} ({reason}); `hf auth login` with a token that may write, or"
            " --dry-run"
        ) from None
    return str(repository)
