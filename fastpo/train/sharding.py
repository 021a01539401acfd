"""How processes share weights, gradients and optimizer states, and what one of them holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastpo.config import OptimConfig, TrainConfig
from fastpo.train.bf16_optimizer import CHUNK
from fastpo.train.optimizer import optimizer_bytes, whole_size
from fastpo.train.zero import read_settings

BUCKET = 500_000_000
"""DeepSpeed's default of `reduce_bucket_size`, in elements."""

LIVE = 1_000_000_000
"""DeepSpeed's default of `stage3_max_live_parameters`."""


@dataclass(frozen=True)
class Sharding:
    """How processes share what they hold (ZeRO, arXiv 1910.02054).

    Attributes:
        processes: Their number N.
        stage: 0 for plain data parallelism; 1 shares the optimizer's states, 2 also the gradients,
            3 also the weights, frozen ones too.
        offload_optimizer: States (and from stage 2 on gradients) lie in host memory.
        offload_param: Stage 3's weights lie in host memory.
        bucket: Elements of one gradient bucket.
        buckets: How many of them.
        live: Weights that stage 3 holds whole at a time.
    """

    processes: int = 1
    stage: int = 0
    offload_optimizer: bool = False
    offload_param: bool = False
    bucket: int = BUCKET
    buckets: int = 1
    live: int = LIVE

    def __str__(self) -> str:
        """Returns it in words."""
        if self.stage == 0:
            return "plain data parallelism" if self.processes > 1 else "one process"
        away = [
            name
            for name, is_away in (
                ("optimizer", self.offload_optimizer),
                ("weights", self.offload_param),
            )
            if is_away
        ]
        return f"ZeRO-{self.stage}" + (f", {' and '.join(away)} offloaded" if away else "")

    def part(self, size: int, from_stage: int) -> int:
        """What one process holds of something that is shared from a stage on."""
        return -(-size // self.processes) if self.stage >= from_stage else size


def read_sharding(train: TrainConfig, processes: int) -> Sharding:
    """Reads `train.deepspeed`: nothing, a packaged name, or a DeepSpeed JSON file.

    Raises:
        ConfigError: As training would, about a file that is missing, wrong or contradicts `train`.
    """
    if train.deepspeed is None:
        return Sharding(processes)
    zero = read_settings(train, processes)["zero_optimization"]
    stage = zero["stage"]
    overlap = zero.get("overlap_comm")
    return Sharding(
        processes,
        stage,
        offload_optimizer=_offloaded(zero, "offload_optimizer"),
        offload_param=stage == 3 and _offloaded(zero, "offload_param"),
        bucket=_number(zero.get("reduce_bucket_size"), BUCKET),
        buckets=2 if overlap and stage < 3 else 1,
        live=_number(zero.get("stage3_max_live_parameters"), LIVE),
    )


def _offloaded(zero: dict[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"


def _number(value: Any, default: int) -> int:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else default


@dataclass(frozen=True)
class Trained:
    """The policy's weights in numbers.

    Attributes:
        count: Trainable weights.
        parameters: All of them.
        trainable: Bytes of the trainable ones; their gradients have as many.
        frozen: Bytes of the others.
        states: Bytes of the optimizer's states.
        step: Bytes that one optimizer step takes beside them.
    """

    count: int
    parameters: int
    trainable: int
    frozen: int
    states: int
    step: int


def count_trained(parameters: Iterable[nn.Parameter], train: TrainConfig) -> Trained:
    """Adds up a policy's parameters, whole ones also where ZeRO-3 shares them."""
    weights = list(parameters)
    trainable = [p for p in weights if p.requires_grad]
    return Trained(
        count=sum(whole_size(p) for p in trainable),
        parameters=sum(whole_size(p) for p in weights),
        trainable=_bytes(trainable),
        frozen=_bytes(p for p in weights if not p.requires_grad),
        states=optimizer_bytes(trainable, train.optim),
        step=_step_bytes(trainable, train.optim, train.precision == "fp16"),
    )


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(whole_size(p) * p.element_size() for p in parameters)


def _step_bytes(trainable: list[nn.Parameter], optim: OptimConfig, scaled: bool) -> int:
    """Temporaries of one optimizer step.

    AdamW is one kernel, except under fp16's scaler, where it holds the root of every second
    moment. The others go one weight at a time, with about three float32 copies of it. bfloat16
    weights are stepped in chunks, of which weights and gradients are copied to float32.
    """
    if not trainable:
        return 0
    largest = 4 * max(whole_size(p) for p in trainable)
    if optim.name == "adamw":
        step = 4 * sum(whole_size(p) for p in trainable) if scaled else 0
    else:
        step = 3 * largest
    rounded = sum(whole_size(p) for p in trainable if p.element_size() < 4)
    return step + (8 * max(min(rounded, CHUNK), largest // 4) if rounded else 0)


def held(trained: Trained, sharding: Sharding) -> dict[str, int]:
    """Weights, gradients, states and buckets of one process.

    With P trainable weights, F bytes of frozen ones and N processes, float32 training holds
    `4P + F` of weights, `4P` of gradients and, under AdamW, `8P` of states. DeepSpeed's engine adds
    `4P` to the states, the copy it steps on. Divided by N: states from stage 1 on, gradients from
    stage 2, weights at stage 3.

    Returns:
        Bytes: `weights`, `gradients`, `optimizer`, `communication`, and `host` for
        what lies in host memory instead.
    """
    zero, host = sharding, 0
    weights = zero.part(trained.trainable + trained.frozen, 3)
    gradients = zero.part(trained.trainable, 2)
    engine = 4 * trained.count if zero.stage else 0
    states = zero.part(trained.states + engine, 1)
    communication = trained.trainable if zero.stage == 0 and zero.processes > 1 else 0
    if zero.stage:
        communication = 4 * zero.bucket * zero.buckets
    if zero.stage == 3:
        each = (trained.trainable + trained.frozen) / max(trained.parameters, 1)
        communication += int(each * min(zero.live, trained.parameters))
    if zero.offload_optimizer:
        host, states = host + states, 0
        if zero.stage >= 2:
            host, gradients = host + gradients, 0
    if zero.offload_param:
        host, weights = host + weights, 0
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": states,
        "communication": communication,
        "host": host,
    }
