"""Rows of a data set on the hub, at a fixed revision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import datasets
from datasets.naming import camelcase_to_snakecase
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

from partial_lora.errors import PartialLoraError

_SECONDS = 10.0  # that the hub may take to answer at all


def read(name: str, path: str, subset: str | None, revision: str | None) -> Mapping[str, datasets.Dataset]:
    """Every split of a data set; what the hub's own cache holds is not downloaded again.

    Args:
        path: a repository of the hub, or a local folder laid out like one.
        subset: the part of it that is read, where it has several.

    Raises PartialLoraError, without any wait for a hub that cannot be reached, with what needs no hub.
    """
    if not Path(path).is_dir() and not _cached(path):
        _reach(name, path, revision)
    try:
        return datasets.load_dataset(path, subset, revision=revision)
    except (OSError, HTTPError) as error:
        raise _unreachable(name, path, first_line(error)) from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = first_line(error.__cause__ or error)
        raise PartialLoraError(f"task={name}: cannot read {path} (task.subset={subset}): {cause}") from error


def _reach(name: str, path: str, revision: str | None) -> None:
    """Ask the hub once whether it has a data set; the library would ask for half a minute."""
    try:
        HfApi().dataset_info(path, revision=revision, timeout=_SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        reason = "no such data set or revision there, or no access to it"
        raise _unreachable(name, path, reason) from error
    except (OSError, HTTPError, HFValidationError) as error:
        raise _unreachable(name, path, first_line(error)) from error


def _cached(path: str) -> bool:
    """Whether an earlier run left the data set in the library's cache, so that it may do without the hub."""
    *owner, repository = path.split("/")
    folder = "___".join([*owner, camelcase_to_snakecase(repository)])
    return (Path(datasets.config.HF_DATASETS_CACHE) / folder).is_dir()


def _unreachable(name: str, path: str, reason: str) -> PartialLoraError:
    return PartialLoraError(
        f"task={name}: cannot fetch {path} from the model hub ({reason}); without one use the offline default "
        "model=vit_s14 task=digits, or task.data_files={train: FILE.parquet, test: FILE.parquet}"
    )


def first_line(error: BaseException) -> str:
    """An exception in one line: its kind and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
