"""Every kind of step that `bench_step.py` times, on one shared model and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from step_models import (
    SIZES,
    build_denoiser,
    build_text_encoders,
    build_vae,
    endless,
    make_inputs,
)
from step_noise import Noising, ddpm_noising, flow_noising
from step_recipes import FLOW_RECIPES, RECIPES, Recipe, make_averages
from step_timing import Parts, TimedNoise, TimedOptimizer, TimedProcesses
from torch import Tensor, nn

from fastpo.config import Config, parse_config
from fastpo.ledger import PairLedger
from fastpo.models.denoisers import Denoisers, setup_denoisers
from fastpo.models.registry import load_family
from fastpo.noise import make_noise
from fastpo.precision import DTYPES
from fastpo.train.annotators import Annotators
from fastpo.train.distributed import Processes, setup_accelerator
from fastpo.train.ema import setup_averages
from fastpo.train.live_share import LiveShare
from fastpo.train.objective import build_loss
from fastpo.train.optimizer import setup_schedule
from fastpo.train.state import TrainingState
from fastpo.train.trainer import Trainer
from fastpo.types import PairBatch

FLOOR = "bare policy"
CLOSED = 0.2  # share of the pairs whose gate is closed, where closed ones have no backward pass
LEDGER = {
    "objective": {"name": "adaptive_dpo", "beta": 2500.0, "weight_kind": "gate"},
    "annotators": {"kind": "ledger"},
}
AVERAGES = {"kind": "ema", "warmup_steps": 0}
RELEASED = {"name": "adaptive_dpo", "beta": 1000.0}
OURS: dict[str, dict[str, Any]] = {
    "MaPO": {"objective": {"name": "mapo"}},
    "DPO, cached reference": {"objective": {"name": "dpo"}, "reference": "cached"},
    "DPO, live reference": {"objective": {"name": "dpo"}},
    "Adaptive-DPO, ledger, cached reference": {**LEDGER, "reference": "cached"},
    "Adaptive-DPO, ledger, cached reference, alive": {
        **LEDGER,
        "reference": "cached",
        "backward": "alive",
    },
    "Adaptive-DPO, ledger, cached reference, a quarter sampled": {
        **LEDGER,
        "reference": "cached",
        "backward": "sampled",
        "backward_threshold": 4.0,  # margins of untrained errors: half of the scales are 0, half 2
    },
    "Adaptive-DPO, ledger, live reference": LEDGER,
    "Adaptive-DPO, averages one by one, live reference": {
        "objective": RELEASED,
        "annotators": {**AVERAGES, "batched": False},
    },
    "Adaptive-DPO, averages in one pass, live reference": {  # LoRA alone has it
        "objective": RELEASED,
        "annotators": {**AVERAGES, "batched": True},
    },
}
OPTIONS: dict[str, dict[str, Any]] = {
    "torch.compile": {"compile": True},
    "channels-last": {"channels_last": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "8-bit AdamW": {"optim": {"schedule": "constant", "name": "adamw_8bit"}},
    "Adafactor": {"optim": {"schedule": "constant", "name": "adafactor"}},
    "bf16 weights": {"weights": "bf16"},
    "flash attention": {"attention": "flash"},
    "xformers attention": {"attention": "xformers"},
}
PROVIDERS = (FLOOR, *(f"FastPO {n}" for n in OURS), *(f"recipe {n}" for n in RECIPES))
FLOW_PROVIDERS = (
    FLOOR,
    *(f"FastPO {n}" for n in OURS if "averages" not in n and n != "MaPO"),
    *(f"recipe {n}" for n in FLOW_RECIPES),
)
EVERY = tuple(dict.fromkeys((*PROVIDERS, *FLOW_PROVIDERS)))
Step = Callable[[], None]


def providers_of(size: str) -> tuple[str, ...]:
    """The providers of a size: UNets and transformers have other recipes."""
    return FLOW_PROVIDERS if SIZES[size].flow else PROVIDERS


def rival(name: str, *, flow: bool = False) -> str:
    """The recipe that trains the objective of one of ours; none has another kind of step.

    With `flow`, of transformers: Flow-Factory's is the one released for pairs on disk.
    """
    if not name.startswith("FastPO"):
        return ""
    if flow:
        return "" if "MaPO" in name else "recipe Flow-Factory DPO"
    return next((f"recipe {r}" for r in RECIPES if r in name), "recipe Diffusion-DPO")


def groups(method: str, names: Iterable[str], *, flow: bool = False) -> list[tuple[str, ...]]:
    """Providers that are measured together, on one model: those of an objective, and the floor.

    Full fine-tuning's moving averages, eight bytes a weight, stay apart from the recipe's own.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        if name == FLOOR or (method == "full" and "in one pass" in name):
            continue
        apart = method == "full" and "averages" in name
        group = "averages" if apart else rival(name, flow=flow) or name
        found.setdefault(group, [FLOOR]).append(name)
    return [tuple(group) for group in found.values()] or [(FLOOR,)]


@dataclass(frozen=True)
class Case:
    """What is measured together: one model, method, precision and batch."""

    size: str
    method: str
    pairs: int
    precision: str
    checkpointing: bool
    option: str = ""

    def config(self, **train: Any) -> Config:
        """The experiment's configuration; paths are not used."""
        return parse_config(
            {
                "model": {"path": "unused"},
                "data": {"source": "folder", "path": "unused"},
                "prepare": {"cache_dir": "unused", "resolution": 8 * SIZES[self.size].latent},
                "train": {
                    "output_dir": "unused",
                    "method": self.method,
                    "micro_batch_size": self.pairs,
                    "precision": self.precision,
                    "gradient_checkpointing": self.checkpointing,
                    "max_steps": 1_000_000,
                    "optim": {"schedule": "constant"},
                    "trackers": [],
                    "objective": {"name": "dpo"},
                    **OPTIONS.get(self.option, {}),
                    **train,
                },
            }
        )


class Bench:
    """One model and its optimizer, and several kinds of steps on them.

    Args:
        case: The case.
        names: The providers wanted; only what these need is allocated.
    """

    def __init__(self, case: Case, names: tuple[str, ...]) -> None:
        self.case, self.size, self.parts = case, SIZES[case.size], Parts()
        self._looks = False  # whether the step that runs may look before it differentiates
        config = case.config()
        accelerator = setup_accelerator(config.train)
        self.processes = Processes(accelerator, config.train)
        self.timed = TimedProcesses(accelerator, config.train, self.parts)
        device = self.processes.device
        self.inputs = make_inputs(self.size, case.pairs, device)
        self.denoisers = self._denoisers(config, any(_needs_reference(n) for n in names))
        trainable = self.denoisers.trainable
        optimizer = self.processes.choose_optimizer(trainable, seed=0)
        self.policy, self.optimizer, self.weights = self.processes.prepare_policy(
            self.denoisers.policy, trainable, optimizer
        )
        self.noising = self._noising()
        self.encoders: tuple[Any, list[nn.Module]] | None = None
        if any(n.startswith("recipe") for n in names):
            self.encoders = self._frozen_encoders(device)
        self.steps: dict[str, Step] = {name: self._step(name) for name in names}

    def _noising(self) -> Noising:
        return flow_noising(self.denoisers.family) if self.size.flow else ddpm_noising()

    def _denoisers(self, config: Config, needs_reference: bool) -> Denoisers:
        torch.manual_seed(0)
        with self.inputs.pixels.device:  # random weights are drawn where they are used
            model = build_denoiser(self.size)
        denoisers = setup_denoisers(
            load_family(self.size.family), model, config.train, needs_reference=needs_reference
        )
        for module in (denoisers.policy, denoisers.frozen):
            if module is not None:
                nn.Module.to(module, self.processes.device)
                module.register_forward_pre_hook(self._enter_model)
                module.register_forward_hook(self._leave_model, with_kwargs=True)
        return denoisers

    def _frozen_encoders(self, device: torch.device) -> tuple[Any, list[nn.Module]]:
        with device:
            vae, texts = build_vae(self.size), build_text_encoders(self.size)
        for module in (vae, *texts):
            module.requires_grad_(False).eval()
        texts = [text.to(DTYPES[self.case.precision]) for text in texts]
        return vae, texts

    # One module may be policy, reference and annotator in turn. A forward with gradients is the
    # policy's, one of the frozen copy or with the adapters off the reference's; one of more rows
    # than the batch has is the averages', with which the reference may travel. A step that looks
    # before it differentiates runs the policy without gradients too.
    def _enter_model(self, *_: Any) -> None:
        if self.parts.on:
            self._began = self.parts.now()

    def _leave_model(
        self, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any], _: Any
    ) -> None:
        if not self.parts.on:
            return
        part = "annotators"
        rows = len(inputs[0] if inputs else named["hidden_states"])
        together = rows > 2 * self.case.pairs
        if torch.is_grad_enabled():
            part = "policy forward"
        elif module is self.denoisers.frozen or (_adapters_off(module) and not together):
            part = "reference"
        elif self._looks:
            part = "policy forward"
        self.parts.seconds[part] += self.parts.now() - self._began

    def _step(self, name: str) -> Step:
        if name == FLOOR:
            return self._floor()
        kind, _, which = name.partition(" ")
        return self._ours(which) if kind == "FastPO" else self._recipe(which)

    def _floor(self) -> Step:
        """Plain fine-tuning on cached latents, as one would write it with diffusers."""
        policy, processes = self.denoisers.policy, self.processes
        trainable, device = list(self.denoisers.trainable.values()), processes.device

        def step() -> None:
            with self.parts("noise"):
                batch = self.inputs.batch.to(device)
                mean = batch.latent_mean.float()
                std = torch.exp(0.5 * batch.latent_logvar.float())
                latents = mean + std * torch.randn_like(mean)
                noised = self.noising.draw(latents * self.noising.schedule.latent_scale)
            with processes.autocast():
                answer = self.denoisers.predict(policy, noised, batch.conditions)
            with self.parts("loss"):
                loss = F.mse_loss(answer.float(), noised.target)
            with self.parts("backward"):
                processes.backward(loss)
            with self.parts("optimizer"):
                processes.clip(trainable)
                self.optimizer.step()
                self.optimizer.zero_grad()

        return step

    def _recipe(self, name: str) -> Step:
        assert self.encoders is not None
        averages = []
        if name == "Adaptive-DPO":
            averages = make_averages(self.denoisers.policy, self.case.precision)
        recipe = Recipe(
            denoisers=self.denoisers,
            optimizer=self.optimizer,
            scheduler=self.noising.scheduler,
            vae=self.encoders[0],
            text_encoders=self.encoders[1],
            autocast=self.processes.autocast,
            averages=averages,
            logged=[],
        )
        run = {**RECIPES, **FLOW_RECIPES}[name]
        return lambda: run(recipe, self.inputs, self.parts)

    def _ours(self, name: str) -> Step:
        trainer = self._trainer(self.case.config(**OURS[name]))
        batches, count = endless(self.inputs.batch), iter(range(1_000_000))

        def step() -> None:
            self._looks = trainer.config.backward != "all"
            table = trainer.optimizer_step(batches, next(count)).read()
            self._looks = False
            with self.parts("ledger"):
                trainer.record(table)

        return step

    def _trainer(self, config: Config) -> Trainer:
        """The trainer as `setup_trainer` makes it, with this bench's model and data."""
        train, device = config.train, self.processes.device
        noise = make_noise(
            self.noising.schedule,
            seed=0,
            min_timestep=0,
            max_timestep=None,
            sample_latents=True,
            device=device,
        )
        pairs = self.case.pairs
        optimizer = TimedOptimizer(self.optimizer, self.parts)
        state = TrainingState(
            trainable=self.denoisers.trainable,
            weights=self.weights,
            optimizer=optimizer,
            schedule=setup_schedule(self.optimizer, train.optim, 1_000_000),
            ledger=PairLedger(pairs),
            last_minority=torch.zeros(pairs),
            averages=setup_averages(train, self.weights),
            scaler=self.processes.scaler,
            live_share=None if train.backward == "all" else LiveShare(train),
        )
        if train.backward == "alive":  # a verdict that no vote of the bench's steps changes
            state.ledger.visits += 1
            state.ledger.total += 1e6
            state.ledger.total[: round(CLOSED * pairs)] = -1e6
        conditions = self.inputs.batch.conditions
        of_pairs = self.denoisers.family.pair_conditions
        return Trainer(
            config=train,
            seed=0,
            processes=self.timed,
            noise=TimedNoise(**vars(noise), parts=self.parts),
            empty_prompt={n: t[:1] for n, t in conditions.items() if n not in of_pairs},
            denoisers=self.denoisers,
            policy=self.policy,
            annotators=Annotators(train, self.timed, self.denoisers, state),
            reference_errors=_KnownErrors() if train.reference == "cached" else None,
            loss=self.parts.wrap("loss", build_loss(train)),
            state=state,
        )


class _KnownErrors:
    """The reference's errors as `fastpo.reference_cache.store` reads them: from a mapped table."""

    def __init__(self) -> None:
        self._table = np.full((1024, 2), 0.1, dtype=np.float32)
        self.visits = 1

    def lookup(self, batch: PairBatch) -> Tensor:
        pairs = self._table[batch.index.numpy()]
        return torch.from_numpy(pairs.T.reshape(-1).copy())


def _adapters_off(module: nn.Module) -> bool:
    layers = (m for m in module.modules() if isinstance(m, BaseTunerLayer))
    first = next(layers, None)
    return first is not None and first.disable_adapters


def _needs_reference(name: str) -> bool:
    return not (name == FLOOR or "MaPO" in name or "cached reference" in name)
