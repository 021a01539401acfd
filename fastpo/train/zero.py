"""DeepSpeed ZeRO: its settings, and the policy's weights where processes share them.

The engine keeps the weights as they are: trainable ones float32, the frozen base in the precision
of the run, computed under torch's autocast (`torch_autocast` of the settings). So in fp32 a run
takes the same steps under every stage and without DeepSpeed, to rounding, and in bf16 stages 1 and
2 run the very passes of plain training. Stage 3's hooks let autograd add the gradients of what
several layers use in another order; what that does, and why DeepSpeed's own bf16 mode is not used,
is measured in `docs/measurements.md`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch._tensor_str import printoptions
from torch.optim import Optimizer

from fastpo.config import OptimConfig, TrainConfig, check_stage_3
from fastpo.errors import ConfigError
from fastpo.system.process import default_device
from fastpo.train.weights import PolicyWeights, State, parameter_name

NAMES = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
# Options of `zero_optimization` under which weights lie elsewhere than `ZeroWeights` expects.
UNSUPPORTED = {
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
    "mics_shard_size": -1,
    "zenflow": None,
}


def short_texts() -> AbstractContextManager[None]:
    """Around an engine's start: stage 3 forms the text of every weight, which nobody reads.

    The text of a few numbers instead of up to a thousand takes a sixth of the time
    (`findings/deepspeed-zero3-formats-every-weight-for-nobody.sh`).
    """
    return printoptions(threshold=0, edgeitems=1)


def read_settings(config: TrainConfig, processes: int) -> dict[str, Any]:
    """Reads the DeepSpeed JSON of `train.deepspeed` and fills in what our configuration decides.

    Batch sizes, accumulation, clipping and precision may be left out, be `"auto"`, or say the same.

    Args:
        config: The run; `deepspeed` is a name of `NAMES` or a path.
        processes: Number of processes.

    Raises:
        ConfigError: The file is missing or not JSON, contradicts our configuration, or asks for
            what FastPO does not support; the text names the key.
    """
    assert config.deepspeed is not None
    settings, where = read_json(config.deepspeed), f"train.deepspeed: {config.deepspeed}"
    for section in ("optimizer", "scheduler"):
        if section in settings:
            raise ConfigError(f"{where} has the section {section!r}; train.optim decides that")
    zero = settings.setdefault("zero_optimization", {})
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2, 3):
        raise ConfigError(
            f"{where}: zero_optimization.stage must be 1, 2 or 3, got {stage!r}; for plain data "
            "parallelism leave train.deepspeed out"
        )
    if stage == 3:
        try:
            check_stage_3(config)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    for key, value in UNSUPPORTED.items():
        if zero.get(key, value) != value:
            raise ConfigError(f"{where}: zero_optimization.{key} is not supported")
    for key in ("offload_optimizer", "offload_param"):
        device = (zero.get(key) or {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise ConfigError(f"{where}: zero_optimization.{key}.device: {device} is not supported")
    batch = config.micro_batch_size * config.accumulation_steps
    half = config.precision != "fp32"
    decided = {
        "train_micro_batch_size_per_gpu": (config.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (config.accumulation_steps, "train.accumulation_steps"),
        "train_batch_size": (batch * processes, "micro-batch x accumulation x processes"),
        "gradient_clipping": (config.optim.max_grad_norm, "train.optim.max_grad_norm"),
        "fp16.enabled": (False, "the engine, which keeps weights float32"),
        "bf16.enabled": (False, "the engine, which keeps weights float32"),
        "torch_autocast.enabled": (half, "train.precision"),
        "torch_autocast.dtype": ("bfloat16", "train.precision"),
        # It adds an unrounded bias where the reference, like plain autocast, adds a rounded one.
        "zero_optimization.memory_efficient_linear": (False, "agreement with the reference"),
        "zero_allow_untested_optimizer": (True, "train.optim"),
        "zero_force_ds_cpu_optimizer": (False, "train.optim"),
    }
    for key, (value, who) in decided.items():
        _decide(settings, key, value, who, where)
    # Gradients are summed in float32 unless the file lists modules for lower precision.
    settings["torch_autocast"].setdefault("lower_precision_safe_modules", [])
    return settings


def read_json(name: str) -> dict[str, Any]:
    """Reads the DeepSpeed JSON of that name, packaged or a file.

    Raises:
        ConfigError: There is none, or it holds no object.
    """
    if name in NAMES:
        return json.loads(
            resources.files("fastpo").joinpath("configs", "deepspeed", f"{name}.json").read_text()
        )
    try:
        settings = json.loads(Path(os.path.expanduser(name)).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            f"train.deepspeed: {name} is neither a file nor one of {', '.join(NAMES)}"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"train.deepspeed: {name} is not a JSON file: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"train.deepspeed: {name} must hold an object")
    return settings


def _decide(settings: dict[str, Any], key: str, value: Any, who: str, where: str) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
    given = settings.get(leaf, "auto")
    if given != "auto" and given != value:
        raise ConfigError(
            f'{where}: {key} is {given!r} there, but {who} says {value!r}; write "auto" there'
        )
    settings[leaf] = value


def offloads_optimizer(settings: Mapping[str, Any]) -> bool:
    """Whether the optimizer's state, and its step, stay in host memory."""
    offload = settings["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") == "cpu"


def prepare_environment() -> None:
    """What DeepSpeed wants to find in the environment, set for this process alone.

    `DS_ACCELERATOR=cpu` where there is no GPU, the folder of Python's own scripts on the path (the
    CPU optimizer is compiled on first use and looks for ninja there), and, for a run without a
    launcher, a group of one process.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "train.deepspeed: DeepSpeed is not installed; `pip install 'fastpo[deepspeed]'`"
        )
    if default_device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed.ops

        # Its shared-memory collectives for CPUs serve inference alone, but would be compiled now.
        deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", ""), scripts))
    if "WORLD_SIZE" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone)
        os.environ.setdefault("MASTER_PORT", str(_free_port()))


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def cpu_adam(parameters: list[nn.Parameter], config: OptimConfig) -> Optimizer:
    """DeepSpeed's AdamW for states in host memory; compiled on first use (about a minute).

    Raises:
        ConfigError: As `wait_for_build`.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    wait_for_build("cpu_adam")
    return DeepSpeedCPUAdam(
        parameters,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,  # pyright: ignore[reportArgumentType]
        adamw_mode=True,
    )


def wait_for_build(op: str, *, patience: float = 600.0) -> None:
    """Waits while another process compiles one of DeepSpeed's operators, but not for ever.

    A build holds the file `lock` in the operator's folder (under `TORCH_EXTENSIONS_DIR`, by default
    `~/.cache/torch_extensions`). One that was killed leaves it there, and torch lets every later
    run wait for it, silently and without end.

    Args:
        op: The operator's name, such as `cpu_adam`.
        patience: Seconds after which a build counts as killed.

    Raises:
        ConfigError: The lock is older than that; the text says which file to delete.
    """
    from deepspeed.git_version_info import installed_ops
    from torch.utils.cpp_extension import _get_build_directory

    if installed_ops.get(op):  # compiled when DeepSpeed was installed
        return
    lock, told = Path(_get_build_directory(op, verbose=False), "lock"), False
    while (age := _age(lock)) is not None:
        if age > patience:
            raise ConfigError(
                f"train.deepspeed: {lock} says that DeepSpeed's {op} has been compiling for "
                f"{age / 60:.0f} minutes; a build that was killed leaves that file behind. If none "
                "is running, delete it and start again"
            )
        if not told:
            text = f"waiting for another process, which compiles DeepSpeed's {op} ({lock})"
            Console(stderr=True, soft_wrap=True).print(text)
            told = True
        time.sleep(0.2)


def _age(file: Path) -> float | None:
    """Seconds since a file was made; None if there is none."""
    try:
        return time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return None


class ZeroWeights(PolicyWeights):
    """Trainable weights of a DeepSpeed engine.

    Stages 1 and 2 share the optimizer's state: weights are whole everywhere. Stage 3 also shares
    the weights: each process stores an equal part of each flattened weight, padded at the end.

    Args:
        trainable: The policy's trainable parameters by name.
        zero: The engine's optimizer, which knows where everything lies.
        stage: 1, 2 or 3.
        device: What processes send one another lies there; parts may lie in host memory.
        main: Whether this is the main process.
    """

    def __init__(
        self,
        trainable: dict[str, nn.Parameter],
        zero: Any,
        stage: int,
        *,
        device: torch.device,
        main: bool,
    ) -> None:
        super().__init__(trainable, zero.optimizer, main=main)
        self.device = device
        self.zero = zero
        self.stage = stage

    @property
    def whole(self) -> bool:
        """Below stage 3."""
        return self.stage < 3

    @property
    def local(self) -> dict[str, Tensor]:
        """The parameters, or at stage 3 the local parts, flat and padded."""
        if self.stage < 3:
            return super().local
        return {name: p.ds_tensor for name, p in self.trainable.items()}  # pyright: ignore[reportAttributeAccessIssue]

    def release_gathered(self) -> None:
        """At stage 3, drops whatever was gathered or fetched ahead; it is gathered anew."""
        if self.stage == 3:
            self.zero.empty_partition_cache()

    @torch.no_grad()
    def gather(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gathers whole tensors, see `PolicyWeights`; at stage 3 one by one, into host memory."""
        if self.stage < 3:
            return super().gather(parts)
        whole = {}
        for key, part in parts.items():
            tensor = self._whole(part, self.trainable[parameter_name(key)])
            if self.main:
                whole[key] = tensor
        return whole

    def _whole(self, part: Tensor, parameter: Any) -> Tensor:
        mine = part.detach().to(self.device)
        pieces = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, mine)
        return torch.cat(pieces)[: parameter.ds_numel].view(parameter.ds_shape).cpu()

    @torch.no_grad()
    def scatter(self, whole: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None:
        """Fills this process's parts, see `PolicyWeights`."""
        if self.stage < 3:
            super().scatter(whole, parts)
            return
        for name, part in parts.items():
            part.copy_(self._part(whole[name], part.numel()))

    def _part(self, whole: Tensor, size: int) -> Tensor:
        """This process's part of a tensor, flat, padded with zeros to `size`."""
        mine = whole.flatten()[dist.get_rank() * size :][:size]
        return nn.functional.pad(mine, (0, size - mine.numel()))

    def load(self, whole: Mapping[str, Tensor]) -> None:
        """Sets the weights, and the optimizer's own copy of them."""
        self.release_gathered()
        super().load(whole)
        for name, parameter in self.trainable.items():
            self._set(parameter, whole[name].to(torch.float32), None)

    def _set(self, parameter: Any, value: Tensor, key: str | None) -> None:
        """Sets the optimizer's copy of a weight (no key) or one of its states."""
        if self.stage == 3:
            value = self._part(value, parameter.ds_tensor.numel())
            self.zero.set_local_hp_param(value, parameter, key)
        else:
            parameter.set_full_hp_param(value, key)

    def optimizer_state(self) -> State:
        """Gathers the state, one tensor at a time, into the main process's host memory."""
        masters = self._masters()
        first = self.optimizer.state[masters[0]]
        if not first:
            return {}
        keys = [k for k, v in first.items() if torch.is_tensor(v) and v.shape == masters[0].shape]
        state: State = {}
        for name, parameter in self.trainable.items():
            values: dict[str, Any] = {"step": torch.tensor(float(first["step"]))}
            for key in keys:
                tensor = self._state(parameter, key)
                if self.main:
                    values[key] = tensor.cpu()
            if self.main:
                state[name] = values
        return state

    def _state(self, parameter: Any, key: str) -> Tensor:
        if self.stage == 3:
            return self.zero.get_full_hp_param(parameter, key)
        return parameter.get_full_hp_param(key)

    @torch.no_grad()
    def load_optimizer_state(self, saved: State) -> None:
        """Makes the optimizer's state, which it has only after a first step, and fills it."""
        if not saved:
            return
        first = next(iter(saved.values()))
        keys = [key for key in first if key != "step"]
        fused = self.optimizer.param_groups[0].get("fused")
        for master in self._masters():
            state, steps = self.optimizer.state[master], float(first["step"])
            if isinstance(self.optimizer, torch.optim.AdamW):
                state["step"] = torch.tensor(steps, device=master.device if fused else "cpu")
            else:
                state["step"] = int(steps)
            for key in keys:
                state[key] = torch.zeros_like(master)
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()  # links parameters to the new states
        for name, parameter in self.trainable.items():
            for key in keys:
                self._set(parameter, saved[name][key].to(torch.float32), key)

    def _masters(self) -> list[Tensor]:
        """The flat float32 tensors that the optimizer steps on."""
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat
        return self.zero.single_partition_of_fp32_groups
