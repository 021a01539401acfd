"""Typed configuration: one frozen model per stage, read from YAML, changed by `--set a.b=c`."""

from fastpo.config.fields import Precision, Section
from fastpo.config.objectives import AdaptiveOptions, ObjectiveConfig
from fastpo.config.sections import (
    AnnotatorsConfig,
    Config,
    DataConfig,
    EmaAnnotators,
    EvaluateConfig,
    LedgerAnnotators,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PrepareConfig,
    TrainConfig,
    dump_config,
    load_config,
    parse_config,
)
from fastpo.config.timesteps import TimestepsConfig

__all__ = [
    "AdaptiveOptions",
    "AnnotatorsConfig",
    "Config",
    "DataConfig",
    "EmaAnnotators",
    "EvaluateConfig",
    "LedgerAnnotators",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "Precision",
    "PrepareConfig",
    "Section",
    "TimestepsConfig",
    "TrainConfig",
    "dump_config",
    "load_config",
    "parse_config",
]
