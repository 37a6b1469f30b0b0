"""What is said of a key that no group of settings has."""

from __future__ import annotations

from difflib import get_close_matches

from partial_lora.runs.identity import defaults

_ELSEWHERE = {  # what other tools call it
    "lr": "trainer.learning_rate",
    "r": "method.rank",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "num_train_epochs": "trainer.epochs",
    "per_device_train_batch_size": "trainer.batch_size",
    "gpus": "trainer.num_processes",
    "sparsity": "calibration.budget",
}


def no_such_key(key: str, about: str = "job") -> str:
    """One line that names the key, the one that is likest to it if any is, and where all are listed.

    about: whose keys, as `--cfg` has it: job or hydra.
    """
    likest = None if about == "hydra" else _likest(key)
    meant = "" if likest is None else f"did you mean {likest}? "
    return f"{key}: no such key; {meant}`partial-lora train --cfg {about}` lists the keys there are"


def _likest(key: str) -> str | None:
    """What another tool's name stands for, the key of that name, or one of the same group that is spelt almost so."""
    group, _, name = key.rpartition(".")
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    names = {each: each.rpartition(".")[2] for each in defaults()}
    same = [each for each, own in names.items() if own == name]
    if len(same) == 1:
        return same[0]
    of_group = {own: each for each, own in names.items() if each.rpartition(".")[0] == group}
    found = get_close_matches(name, of_group, n=1, cutoff=0.75)
    return of_group[found[0]] if found else None
