"""The certificate of a comparison: what was decided, from which scores, so that anyone can derive it again.

verdict.json has the verdict with all that it was decided by; scores.parquet beside it what each test row adds to each
score, and what training has changed on each row of other sets. `partial-lora compare verdict.json --verify` derives the
one from the other. A digest finds what was changed since, by accident or to please; it is no signature.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from partial_lora.errors import PartialLoraError, one_line
from partial_lora.files import flatten, read_json, write_atomic, write_json
from partial_lora.report import forgetting
from partial_lora.report.forgetting import Changes
from partial_lora.report.sequential import Decisions, Outputs, decide
from partial_lora.report.statistics import LEVEL
from partial_lora.settings.identity import computed_from

OWN = ""  # of the columns of scores, the set that is compared on; others have their names
VERDICT, SCORES = "verdict.json", "scores.parquet"
_VERSIONS = ("partial-lora", "numpy", "scipy")  # of what decides
_EXACT = 1e-9  # of a difference that is derived again, by another version of a library


def write(
    folder: Path,
    outputs: Outputs,
    outcome: Decisions,
    *,
    metric: str,
    margin: float,
    looks: Sequence[int],
    settings: Mapping[str, Mapping],
    verdict: Sequence[str],
    forgotten: Mapping[str, Changes],
) -> Path:
    """Write a certificate into a folder; return its file.

    outputs: what `sequential.decide` decided by. margin: in units of a score. settings: of the first run of each
    method. verdict: in words. forgotten: by set, what the verdict says of forgetting.
    """
    every = {OWN: outputs} | {name: changes.by_row for name, changes in forgotten.items()}
    rows = [
        (of_set, name, seed, values)
        for of_set, methods in every.items()
        for name, seeds in methods.items()
        for seed, values in sorted(seeds.items())
    ]
    table = pd.DataFrame(rows, columns=["set", "method", "seed", "values"])
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    write_atomic(folder / SCORES, buffer.getvalue())
    content = {
        "verdict": list(verdict),
        "metric": metric,
        "margin": margin,
        "error": 1 - LEVEL,
        "looks": list(looks),
        "leader": outcome.leader,
        "decisions": {name: asdict(one) for name, one in outcome.by_method.items()},
        "rows": {name: {seed: len(one) for seed, one in seeds.items()} for name, seeds in outputs.items()},
        "scores": digest_of_scores(every),
        "forgetting": forgetting.as_record(forgotten, outcome.leader),
        "settings": {name: digest_of_settings(one) for name, one in settings.items()},
        "versions": {name: version(name) for name in _VERSIONS},
    }
    content = json.loads(json.dumps(content).replace("NaN", "null"))  # a look at one seed has no interval
    write_json(folder / VERDICT, content | {"digest": _digest(content)})
    return folder / VERDICT


def found_wrong(file: Path) -> list[str]:
    """Return what in a certificate does not hold, a line each: none where all is as it was decided.

    Raises PartialLoraError for a file that is no certificate, or has no scores beside it.
    """
    try:
        content = read_json(file)
        table = pd.read_parquet(file.with_name(SCORES))
        every: dict[str, dict[str, dict[int, np.ndarray]]] = {}
        for of_set, name, seed, values in table[["set", "method", "seed", "values"]].itertuples(index=False):
            every.setdefault(of_set, {}).setdefault(name, {})[int(seed)] = np.asarray(values, float)
        outputs = every[OWN]
        sealed = {key: value for key, value in content.items() if key != "digest"}
        outcome = decide(outputs, content["margin"], content["looks"])
        decisions, scores = content["decisions"], content["scores"]
        lines = [] if content["digest"] == _digest(sealed) else [f"{file.name} was changed after it was written"]
        lines += [] if scores == digest_of_scores(every) else [f"{SCORES} has other scores than were decided by"]
        lines += [] if outcome.leader == content["leader"] else [f"{outcome.leader} leads, not {content['leader']}"]
        for name in sorted({*decisions, *outcome.by_method}):
            derived, said = outcome.by_method.get(name), decisions.get(name)
            if derived is None or said is None or not _alike(asdict(derived), said):
                apart = f"{derived.verdict}, {derived.difference:.6g} below {derived.against}" if derived else "none"
                lines.append(f"{name}: its scores give another decision: {apart}")
        said = content["forgetting"]
        changes = {name: Changes(one["metric"], one["before"], every[name]) for name, one in said.items()}
        derived = forgetting.as_record(changes, outcome.leader)
        wrong = [name for name in said if not _alike(flatten(derived[name]), flatten(said[name]))]
        lines += [f"{name}: its scores give another forgetting" for name in wrong]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"expected the certificate of a comparison, with {SCORES} beside it ({one_line(error)})"
        raise PartialLoraError(f"{file}: {what}") from error
    return lines


def digest_of_scores(every: Mapping[str, Outputs]) -> str:
    """Return the SHA-256 of scores by set, whatever file they are in."""
    digest = hashlib.sha256()
    for of_set in sorted(every):
        for name, seeds in sorted(every[of_set].items()):
            for seed, values in sorted(seeds.items()):
                key = json.dumps([of_set, name, seed, len(values)])
                digest.update(key.encode() + np.asarray(values, "<f8").tobytes())
    return digest.hexdigest()


def digest_of_settings(config: Mapping) -> str:
    """Return the SHA-256 of the settings that a run computes from, its seed apart."""
    return _digest({key: value for key, value in computed_from(config).items() if key != "seed"})


def of_run(results_dir: Path, config: Mapping) -> tuple[Path, dict] | None:
    """Return the certificate that a run of these settings has won, and its file; None where there is none."""
    for file in sorted(results_dir.glob(f"take/**/{VERDICT}")):
        try:
            content = read_json(file)
            if content["settings"][content["leader"]] == digest_of_settings(config):
                return file, content
        except (OSError, ValueError, KeyError, TypeError):  # of another kind, or broken
            continue
    return None


def _digest(content: Mapping) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _alike(derived: Mapping, said: Mapping) -> bool:
    """Return whether a decision is as it was said: words and counts the same, numbers but for rounding."""
    for key, value in derived.items():
        if isinstance(value, float):
            number = np.nan if said[key] is None else said[key]
            if not np.isclose(value, number, rtol=_EXACT, atol=_EXACT, equal_nan=True):
                return False
        elif value != said[key]:
            return False
    return True
