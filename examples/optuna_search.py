"""Let Optuna look for the learning rate and the rank: it goes by the validation score, never by the test score.

    pip install '.[sweeps]'
    python examples/optuna_search.py
    MODEL=vit_s14 TRIALS=20 python examples/optuna_search.py trainer.max_steps=null

Prints: the score of every trial on validation, and the best one.
Takes: about 60 s of CPU time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

out = Path("out/optuna_search")
out.mkdir(parents=True, exist_ok=True)
model = os.environ.get("MODEL", "tiny_vit")  # tiny and random; vit_s14 is real, and vit_b16 comes from the hub
trials = int(os.environ.get("TRIALS", "4"))


def validated(rate: float, rank: int) -> float | None:
    """Train, unless that is done, and return the primary metric on validation; None where the run failed."""
    settings = [f"model={model}", "task=digits", "calibration=fixed", "trainer.max_steps=60", f"results_dir={out}"]
    chosen = [f"trainer.learning_rate={rate}", f"method.rank={rank}"]
    command = [sys.executable, "-m", "partial_lora", "train", *settings, *chosen, *sys.argv[1:]]
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        return None
    result = json.loads((out / "latest" / "result.json").read_text(encoding="utf-8"))
    validation = result["metrics"]["validation"]
    return validation[validation["primary"]]


# The study is kept in a file: the same command goes on with it, TRIALS more. Its name holds what its scores depend on.
study = optuna.create_study(
    study_name=" ".join([model, *sys.argv[1:]]),
    direction="maximize",  # of accuracy; minimize a loss
    storage=JournalStorage(JournalFileBackend(str(out / "study.log"))),
    load_if_exists=True,
)
study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))  # with one seed it would draw the same again
for _ in range(trials):
    trial = study.ask()
    score = validated(trial.suggest_float("rate", 1e-4, 1e-1, log=True), trial.suggest_categorical("rank", [4, 8, 16]))
    study.tell(trial, score, state=optuna.trial.TrialState.FAIL if score is None else None)
    print(f"trial {trial.number}: {trial.params}: {'failed' if score is None else f'{score:.4f}'}", flush=True)
print(f"best on validation: {study.best_value:.4f} with {study.best_params}")
