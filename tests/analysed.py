"""Settings of analyses that a test can afford: a tiny model, four scored examples a class, three levels."""

from __future__ import annotations

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from partial_lora import analysis_schema, config

TINY = (
    "model=tiny_vit",
    "trainer.device=cpu",
    "calibration.shots=4",
    "calibration.levels=0.3",
    "calibration.max_sparsity=0.9",
)


def settings(*overrides: str) -> dict:
    ConfigStore.instance().store(name="schema", node=analysis_schema.AnalysedConfig)
    with initialize_config_dir(str(config.conf_dir()), version_base="1.3"):
        return analysis_schema.resolve(compose("config", [*TINY, *overrides]))
