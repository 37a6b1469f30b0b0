"""Hydra's loader of settings, for files that are data: of Hydra itself they set no more than how runs are launched.

Hydra has no public class to be told what a file may set, or how a folder is read, so both extend internal ones
(docs/developing/house.md says why none of its plug-ins does that).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from partial_lora.errors import PartialLoraError, one_line
from partial_lora.files import flatten, read_yaml
from partial_lora.settings.arguments import CHOICES, CONFIG_NAME, refused_of_files

_PROVIDER = "command-line"
_OF_COMPOSITION = (  # what Hydra itself writes there, whatever a file says
    "hydra.runtime.choices",
    "hydra.runtime.config_sources",
    "hydra.runtime.cwd",
    "hydra.job.override_dirname",
    "hydra.job.config_name",
)
# Of the package's own files and Hydra's, kept since a comparison composes hundreds of runs: `Loader._own_keys`, what
# was read, and what some of them come to.
_EXPECTED: dict[tuple, dict[str, object]] = {}
_READ: dict[str, ConfigResult | None] = {}
_COMPOSED: dict[tuple, DictConfig] = {}


class Loader(ConfigLoaderImpl):
    """Composes as Hydra does; raises PartialLoraError for what a file of the user's own would change of `hydra`.

    What is composed is compared with what the package's own files and the command line alone come to. So it does not
    matter by which way a file reaches a key: its content, its defaults list, its package, or a sweep's parameters.

    Args:
        paths: where the package's files and Hydra's are.
        overrides: the command line.
        file: the user's own primary config.
        folder: of the user's own group files (--config-dir).
    """

    def __init__(
        self, paths: ConfigSearchPath, overrides: Sequence[str], *, file: str | None = None, folder: Path | None = None
    ) -> None:
        search_path = deepcopy(paths)
        if folder:
            search_path.prepend(_PROVIDER, f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
        super().__init__(search_path)
        sources = self.repository.get_sources()
        sources[:] = [_Folder(_PROVIDER, source.path) if source.provider == _PROVIDER else source for source in sources]
        self._own = ConfigLoaderImpl(paths)
        self._written = [override for override in overrides if override.lstrip("+~").startswith(("hydra.", "hydra/"))]
        self._place = file or (None if folder is None else f"--config-dir {folder}")

    def load_configuration(
        self, config_name: str | None, overrides: list[str], run_mode: RunMode, *options: bool, **named: bool
    ) -> DictConfig:
        if self._place is None:
            return super().load_configuration(config_name, overrides, run_mode, *options, **named)
        try:
            composed = super().load_configuration(config_name, overrides, run_mode, *options, **named)
        except (RecursionError, AttributeError, TypeError) as error:  # `hydra: null`, or a file that chooses itself
            raise PartialLoraError(f"{self._place}: cannot be composed ({one_line(error)})") from error
        self._check(composed, config_name, overrides)
        return composed

    def _parse_overrides_and_create_caching_repo(
        self, config_name: str | None, overrides: list[str]
    ) -> tuple[list[Override], CachingConfigRepository]:
        if self._place is not None:
            return super()._parse_overrides_and_create_caching_repo(config_name, overrides)
        return OverridesParser.create().parse_overrides(overrides), _Own(self.repository)

    def _compose_config_from_defaults_list(
        self, defaults: list[ResultDefault], repo: CachingConfigRepository
    ) -> DictConfig:
        if self._place is not None:
            return super()._compose_config_from_defaults_list(defaults, repo)
        files = tuple((default.config_path, default.package) for default in defaults)
        if files not in _COMPOSED:  # read anew, since composing changes what was read
            read = CachingConfigRepository(self.repository)
            _COMPOSED[files] = super()._compose_config_from_defaults_list(defaults, read)
        return deepcopy(_COMPOSED[files])

    def _check(self, composed: DictConfig, config_name: str | None, overrides: Sequence[str]) -> None:
        """Raise PartialLoraError for the first key of `hydra` that a file has changed and must not."""
        chosen = composed.hydra.runtime.choices
        choices = tuple(f"{group}={chosen[group]}" for group in CHOICES if group in chosen)
        for choice in choices:
            if choice not in self._written and (reason := refused_of_files(*choice.split("="))):
                raise PartialLoraError(f"{self._place}: {reason}")
        expected = self._own_keys(choices, config_name) | {"hydra.overrides": sorted(overrides)}
        keys = _keys(composed)
        keys["hydra.overrides"] = sorted(keys.pop("hydra.overrides.hydra") + keys.pop("hydra.overrides.task"))
        for key, value in keys.items():
            is_known = key in expected or key.startswith("hydra.sweeper.params.")
            reason = refused_of_files(key, value) or (None if is_known else f"{key}={value}: no such field")
            if reason and (key, value) not in expected.items():
                raise PartialLoraError(f"{self._place}: {reason}")

    def _own_keys(self, choices: tuple[str, ...], config_name: str | None) -> dict[str, object]:
        """Return the keys of `hydra` without the user's files, for a launcher and a sweeper; composed once for each."""
        fields = [override for override in self._written if override.lstrip("+~").startswith("hydra.")]
        name, overrides = config_name and CONFIG_NAME, (*choices, *fields)
        if (name, overrides) not in _EXPECTED:
            composed = self._own.load_configuration(name, list(overrides), RunMode.RUN, validate_sweep_overrides=False)
            _EXPECTED[name, overrides] = _keys(composed)
        return _EXPECTED[name, overrides]


class _Own(CachingConfigRepository):
    """The package's own files and Hydra's, each read once."""

    def __init__(self, files: object) -> None:
        self.delegate, self.cache = files, _READ


class _Folder(FileConfigSource):
    """A folder of the user's own group files, which are read as every other file of settings."""

    def load_config(self, config_path: str) -> ConfigResult:
        read_yaml(Path(self.path, self._normalize_file_name(config_path)))
        return super().load_config(config_path)


def _keys(composed: DictConfig) -> dict[str, object]:
    plain = OmegaConf.to_container(composed.hydra, resolve=False, enum_to_str=True)
    return {key: value for key, value in flatten({"hydra": plain}).items() if not key.startswith(_OF_COMPOSITION)}
