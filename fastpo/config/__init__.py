"""Typed configuration: one frozen model per stage, read from YAML, changed by `--set a.b=c`."""

from fastpo.config.data import DataConfig, SourceConfig
from fastpo.config.fields import Precision, Section, decides
from fastpo.config.inputs import input_paths
from fastpo.config.keys import as_text, decided_values, decides_result
from fastpo.config.load import Config, dump_config, flatten, load_config, parse_config, with_keys
from fastpo.config.objectives import OBJECTIVES, AdaptiveOptions, Objective, ObjectiveConfig
from fastpo.config.sections import (
    AnnotatorsConfig,
    EmaAnnotators,
    EvaluateConfig,
    LedgerAnnotators,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PrepareConfig,
)
from fastpo.config.timesteps import TimestepsConfig
from fastpo.config.train import TrainConfig
from fastpo.config.train_checks import check_stage_3

__all__ = [
    "OBJECTIVES",
    "AdaptiveOptions",
    "AnnotatorsConfig",
    "Config",
    "DataConfig",
    "EmaAnnotators",
    "EvaluateConfig",
    "LedgerAnnotators",
    "LoraConfig",
    "ModelConfig",
    "Objective",
    "ObjectiveConfig",
    "OptimConfig",
    "Precision",
    "PrepareConfig",
    "Section",
    "SourceConfig",
    "TimestepsConfig",
    "TrainConfig",
    "as_text",
    "check_stage_3",
    "decided_values",
    "decides",
    "decides_result",
    "dump_config",
    "flatten",
    "input_paths",
    "load_config",
    "parse_config",
    "with_keys",
]
