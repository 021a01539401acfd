"""Processes, devices and precision: the only module that knows accelerate."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
    ProjectConfiguration,
    gather_object,
)
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer

from fastpo.config import TrainConfig
from fastpo.errors import ConfigError, FastPOError, LostProcessError, one_line
from fastpo.precision import autocast
from fastpo.system.process import default_device
from fastpo.system.storage import storage_errors
from fastpo.system.trackers import check_trackers
from fastpo.train import zero
from fastpo.train.heartbeat import beating, collective_limit
from fastpo.train.optimizer import setup_optimizer, warn_of_8bit_on_cpu
from fastpo.train.progress import Progress
from fastpo.train.weights import PolicyWeights

Gathered = TypeVar("Gathered")
SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_CPU,
    DistributedType.DEEPSPEED,
)
ASKS_FOR_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
ENVIRONMENT = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    ASKS_FOR_DEEPSPEED,
    "ACCELERATE_USE_CPU",
    "ACCELERATE_CONFIG_DS_FIELDS",
)
"""What joining may change in the environment; the next run would take it for its launcher's."""


class Processes:
    """The processes of one run, this one among them; everything that they do together.

    Args:
        accelerator: accelerate's handle on them.
        config: The run.

    Attributes:
        progress: Where this one stands; its heartbeat tells the others.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig) -> None:
        self._accelerator = accelerator
        self._config = config
        self.progress = Progress()

    @property
    def count(self) -> int:
        """How many there are."""
        return self._accelerator.num_processes

    @property
    def rank(self) -> int:
        """This one's number, from 0."""
        return self._accelerator.process_index

    @property
    def main(self) -> bool:
        """Whether this one writes files and talks to the user."""
        return self._accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        """Where this one computes."""
        return self._accelerator.device

    @property
    def scaler(self) -> Any:
        """The gradient scaler (fp16), or None."""
        return self._accelerator.scaler

    @property
    def update_was_skipped(self) -> bool:
        """Whether the last update was left out, because the scaler found a gradient not finite."""
        return self._accelerator.optimizer_step_was_skipped

    def follow(self, config: TrainConfig) -> None:
        """Goes on with a configuration in which keys of the optimizer were changed on resuming."""
        self._config = config

    def autocast(self) -> torch.autocast:
        """The precision in which denoisers run; accelerate's own does nothing under DeepSpeed."""
        return autocast(self.device, self._config.precision)

    def accumulate(self, policy: nn.Module) -> AbstractContextManager[Any]:
        """Around one micro-batch: gradients are exchanged in the last one of a step alone."""
        return self._accelerator.accumulate(policy)

    @contextmanager
    def pass_of_step(self, policy: nn.Module, *, last: bool) -> Iterator[None]:
        """As `accumulate`, around one of a step's backward passes, however many there are.

        Args:
            policy: The policy as the launcher wrapped it.
            last: Whether it is the step's last, in which the weights move; alike on all processes.
        """
        self._accelerator.sync_gradients = last
        with nullcontext() if last else self._accelerator.no_sync(policy):
            yield

    @property
    def must_differentiate(self) -> bool:
        """Whether a step needs a backward pass though no process has a gradient for it.

        DeepSpeed, like the gradient scaler, moves the weights only behind one.
        """
        deepspeed = self._accelerator.distributed_type == DistributedType.DEEPSPEED
        return deepspeed or self.scaler is not None

    @property
    def shares_weights(self) -> bool:
        """Whether a forward pass gathers weights from all processes (ZeRO-3)."""
        plugin = self._accelerator.state.deepspeed_plugin
        return plugin is not None and plugin.zero_stage == 3

    def longest(self, numbers: Sequence[int]) -> list[int]:
        """Returns the greatest of all processes' numbers, place by place (collective).

        Args:
            numbers: As many on every process.
        """
        if self.count == 1:
            return list(numbers)
        mine = torch.tensor([numbers], dtype=torch.int64, device=self.device)
        return self.gather(mine).amax(dim=0).tolist()

    def backward(self, loss: Tensor) -> None:
        """Differentiates the loss, divided by the micro-batches of a step on this process."""
        self._accelerator.backward(loss)

    def clip(self, parameters: Iterable[nn.Parameter]) -> Tensor | float | None:
        """Clips the gradients to `train.optim.max_grad_norm`, in a step's last micro-batch.

        Returns:
            Their norm before, NaN where DeepSpeed found it not finite; None in other micro-batches.
        """
        if not self._accelerator.sync_gradients:
            return None
        norm: Any = self._accelerator.clip_grad_norm_(parameters, self._config.optim.max_grad_norm)
        not_finite = isinstance(norm, float) and norm < 0  # how DeepSpeed reports it
        return float("nan") if not_finite else norm

    def gather(self, rows: Tensor) -> Tensor:
        """Returns the rows of all, `(P * N, K)`; one collective, nothing with one process."""
        return rows if self.count == 1 else self._accelerator.gather(rows)  # pyright: ignore[reportReturnType]

    def sum(self, vector: Tensor) -> Tensor:
        """Returns the sum of all vectors; one collective, nothing with one process."""
        return vector if self.count == 1 else self._accelerator.reduce(vector)  # pyright: ignore[reportReturnType]

    def gather_objects(self, mine: Gathered) -> list[Gathered]:
        """Returns what every process has handed in, by rank; one collective, pickled."""
        return [mine] if self.count == 1 else gather_object([mine])

    def agree(self, answer: bool) -> bool:
        """Whether the main process's answer is yes; all processes must ask (collective)."""
        mine = torch.zeros(1, device=self.device)
        if self.main and answer:
            mine += 1.0
        return bool(self.sum(mine))

    def tell(self, number: int) -> int:
        """Returns the main process's number on all of them (collective)."""
        mine = torch.zeros(1, dtype=torch.int64, device=self.device)
        if self.main:
            mine += number
        return int(self.sum(mine))

    def wait(self) -> None:
        """Waits until all processes are here."""
        self._accelerator.wait_for_everyone()

    def start_trackers(self) -> None:
        """Opens the trackers of `train.trackers`.

        Raises:
            ConfigError: One of them does not start; those before it are closed.
        """
        try:
            with storage_errors(self._config.output_dir):
                self._accelerator.init_trackers("fastpo")
        except Exception as error:
            for tracker in self._accelerator.trackers:
                with suppress(Exception):  # one that has not begun has nothing to close
                    tracker.finish()
            self._accelerator.trackers.clear()
            if isinstance(error, FastPOError):
                raise
            names = ", ".join(self._config.trackers)
            raise ConfigError(
                f"train.trackers: not all of {names} could be started ({one_line(error)})"
            ) from error

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Hands a step's metrics to the trackers."""
        with storage_errors(self._config.output_dir):
            self._accelerator.log(metrics, step=step)

    def log_images(self, name: str, images: Sequence[Image.Image], step: int) -> None:
        """Hands images of one size to the trackers, on the main process."""
        with storage_errors(self._config.output_dir):
            for tracker in self._accelerator.trackers:
                if tracker.name == "tensorboard":
                    batch = np.stack([np.asarray(image) for image in images])
                    tracker.log_images({name: batch}, step=step, dataformats="NHWC")
                else:
                    tracker.log_images({name: list(images)}, step=step)

    def choose_optimizer(self, trainable: dict[str, nn.Parameter], *, seed: int) -> Optimizer:
        """The configured optimizer; DeepSpeed's AdamW where its state stays in host memory."""
        config, plugin = self._config, self._accelerator.state.deepspeed_plugin
        if plugin is not None and zero.offloads_optimizer(plugin.deepspeed_config):
            return zero.cpu_adam(list(trainable.values()), config.optim)
        if self.device.type == "cpu":
            warn_of_8bit_on_cpu(config.optim)
        fused = self.device.type == "cuda" and config.precision != "fp16"
        return setup_optimizer(trainable.values(), config.optim, seed=seed, fused=fused)

    def prepare_policy(
        self, policy: nn.Module, trainable: dict[str, nn.Parameter], optimizer: Optimizer
    ) -> tuple[nn.Module, Any, PolicyWeights]:
        """Hands policy and optimizer to the launcher's way of training.

        Returns:
            The policy to call, the optimizer to step, and where the weights lie from now on.
        """
        with zero.short_texts():
            wrapped, prepared = self._accelerator.prepare(policy, optimizer)
        plugin = self._accelerator.state.deepspeed_plugin
        if plugin is None:
            return wrapped, prepared, PolicyWeights(trainable, prepared, main=self.main)
        stage, engine = plugin.zero_stage, wrapped.optimizer
        weights = zero.ZeroWeights(trainable, engine, stage, device=self.device, main=self.main)
        return wrapped, prepared, weights

    def release(self) -> None:
        """Forgets policy and optimizer, of which a next round makes others."""
        self._accelerator.free_memory()

    def heartbeat(self) -> AbstractContextManager[None]:
        """Around a run: tells the others how far this one is, and watches them."""
        limit = self._config.hang_timeout
        return beating(self.progress, rank=self.rank, count=self.count, timeout=limit)

    def leave(self, *, keep_group: bool) -> None:
        """Closes the trackers, and the process group unless it was there before the run."""
        for tracker in self._accelerator.trackers:
            with storage_errors(self._config.output_dir):
                tracker.finish()
        if keep_group or not torch.distributed.is_initialized():
            return
        if self._accelerator.distributed_type == DistributedType.DEEPSPEED:
            from deepspeed import comm

            comm.destroy_process_group()  # torch's own would leave DeepSpeed with dead groups
        else:
            self._accelerator.state.destroy_process_group()


@contextmanager
def joined(config: TrainConfig) -> Iterator[Processes]:
    """Joins the processes for one run; group and environment are then as they were before.

    Raises:
        ConfigError: As `setup_accelerator`.
        LostProcessError: One did not come, or its connection was lost, as the text says.
    """
    keep_group = torch.distributed.is_initialized()
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    try:
        processes = Processes(_come_together(config), config)
        try:
            with processes.heartbeat():
                yield processes
        except LostProcessError:
            keep_group = True  # to leave a broken group may take for ever
            raise
        finally:
            processes.leave(keep_group=keep_group)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _come_together(config: TrainConfig) -> Accelerator:
    try:
        return setup_accelerator(config)
    except torch.distributed.DistError as error:
        line = str(error).partition("\n")[0]
        raise LostProcessError(f"not all processes of the launch came together: {line}") from error


def setup_accelerator(config: TrainConfig) -> Accelerator:
    """Joins the processes that `torchrun`, `accelerate launch`, `deepspeed` or nobody started.

    Without a GPU, processes talk over gloo. A process group that exists already is used.

    Raises:
        ConfigError: fp16 was asked for without a GPU, a tracker cannot be used, DeepSpeed is not
            installed or its settings contradict ours, or the launcher asks for other sharded
            training than `train.deepspeed`.
    """
    on_cpu = default_device().type == "cpu"
    if on_cpu and config.precision == "fp16":
        raise ConfigError(
            "train.precision: fp16 needs a CUDA device (its gradients must be scaled); "
            "use bf16 or fp32 here"
        )
    check_trackers(config.trackers)
    _forget_earlier_run()
    plugin = _deepspeed_plugin(config)
    handlers: list[KwargsHandler] = []
    if "WORLD_SIZE" in os.environ and (plugin or int(os.environ["WORLD_SIZE"]) > 1):
        backend, limit = "gloo" if on_cpu else "nccl", collective_limit(config.hang_timeout)
        handlers = [InitProcessGroupKwargs(backend=backend, timeout=limit)]
    accelerator = Accelerator(
        cpu=on_cpu and plugin is None,  # accelerate takes `cpu` for "no DeepSpeed"
        deepspeed_plugins=plugin,
        mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.accumulation_steps, sync_with_dataloader=False
        ),
        kwargs_handlers=handlers,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(
            project_dir=str(config.output_dir), logging_dir=str(config.output_dir / "tensorboard")
        ),
        step_scheduler_with_optimizer=False,
    )
    if plugin is not None and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise RuntimeError(f"accelerate runs {accelerator.distributed_type} for train.deepspeed")
    if accelerator.distributed_type not in SUPPORTED:
        raise ConfigError(
            f"the launcher asks for {accelerator.distributed_type.value}, which is not supported; "
            "set train.deepspeed (zero3 shares weights as FSDP does), and launch with torchrun or "
            "accelerate launch --multi_gpu"
        )
    return accelerator


def _forget_earlier_run() -> None:
    """Drops what accelerate remembers of an earlier run in this process, whose mode may differ."""
    AcceleratorState._reset_state()
    PartialState._reset_state()


def _deepspeed_plugin(config: TrainConfig) -> DeepSpeedPlugin | None:
    """Our settings as accelerate takes them; None without `train.deepspeed`."""
    asked = os.environ.get(ASKS_FOR_DEEPSPEED, "false").lower() == "true"
    if config.deepspeed is None:
        if asked:
            raise ConfigError(
                "the launcher asks for DeepSpeed; say which in train.deepspeed "
                f"({', '.join(zero.NAMES)}, or a JSON file)"
            )
        return None
    own = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if asked and own not in ("none", config.deepspeed):
        raise ConfigError(
            f"accelerate's configuration names the DeepSpeed file {own}, train.deepspeed names "
            f"{config.deepspeed}; put the one you mean into train.deepspeed"
        )
    zero.prepare_environment()
    # accelerate takes the first for "no DeepSpeed", and refuses a file beside the second.
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_CONFIG_DS_FIELDS"):
        os.environ.pop(name, None)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    settings = zero.read_settings(config, int(os.environ["WORLD_SIZE"]))
    # No `zero.Init` while models load: it would share out the frozen reference as well, silently.
    return DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False)
