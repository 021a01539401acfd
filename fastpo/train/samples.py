"""Images of fixed prompts and seeds while a run trains: the base's, made once, and the policy's.

    <output_dir>/samples/base/00000-0.png, ...     before the first step
    <output_dir>/samples/step-00000500/...         every `train.sample_every` steps, and at the end

The policy itself samples, under the run's autocast; VAE and text encoders are loaded for the time
of sampling alone. Each image has a generator of its own, and torch's generators are put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from fastpo.config import Config
from fastpo.errors import ConfigError
from fastpo.evaluate.folders import (
    BASE,
    SAMPLES,
    SAMPLES_FOLDER,
    SET,
    TRAINING_SAMPLES,
    step_folder,
)
from fastpo.evaluate.sampling import ImageSampler, Sample, plan_samples, read_images, write_png
from fastpo.models.denoisers import without_dropout
from fastpo.precision import DTYPES
from fastpo.system.files import write_json
from fastpo.system.ownership import claim, owned_folder
from fastpo.train.distributed import Processes
from fastpo.train.trainer import Trainer

if TYPE_CHECKING:
    from pathlib import Path

DEFAULT_PROMPTS = 4
"""How many of the evaluation's prompts are sampled where none are given."""


class TrainingSamples:
    """Samples from a run's policy; without `train.sample_every` nothing is ever sampled.

    Args:
        config: The experiment.
        run: The run's folder.

    Raises:
        ConfigError: There is no prompt to sample, or no such size of images.
    """

    def __init__(self, config: Config, run: Path) -> None:
        self.every = config.train.sample_every
        self.folder = run / SAMPLES_FOLDER
        self.samples: list[Sample] = []
        if self.every is None:
            return
        evaluate = config.evaluate.model_copy(update={"seeds_per_prompt": 1})
        if config.train.sample_prompts:
            chosen = {
                "prompts": config.train.sample_prompts,
                "prompts_file": None,
                "prompt_sets": (),
            }
            evaluate = evaluate.model_copy(update=chosen)
        elif not (evaluate.prompts or evaluate.prompts_file or evaluate.prompt_sets):
            raise ConfigError(
                "train.sample_every: nothing to sample; give train.sample_prompts, or "
                "evaluate.prompts"
            )
        self.config = config.model_copy(update={"evaluate": evaluate})
        planned = plan_samples(self.config)
        self.samples = planned if config.train.sample_prompts else planned[:DEFAULT_PROMPTS]
        ImageSampler(self.config, progress=False).check(self.samples)

    def begin(self, processes: Processes) -> None:
        """Makes the base's images, unless they are there (collective)."""
        if self.every is None:
            return
        processes.progress.at("sampling from the base")
        if processes.main:
            claim(self.folder, TRAINING_SAMPLES)
            with generators_kept(processes.device):
                sampler = ImageSampler(self.config, progress=False)
                sampler.fill(self.folder / BASE, self.samples, label=BASE)
            _release(processes.device)
        processes.wait()

    def take(self, trainer: Trainer, step: int, total_steps: int) -> None:
        """Samples from the policy where that is due after `step` finished steps (collective)."""
        if self.every is None or (step % self.every and step != total_steps):
            return
        processes = trainer.processes
        processes.progress.at("sampling")
        if processes.main:
            images = self._images(trainer)
            self._write(images, step)
            base = read_images(self.folder / BASE, self.samples)
            pairs = [_beside(*pair) for pair in zip(base, images, strict=True)]
            processes.log_images("samples (base, policy)", pairs, step)
        processes.wait()

    def _images(self, trainer: Trainer) -> list[Image.Image]:
        processes, denoisers = trainer.processes, trainer.denoisers
        options, size = self.config.evaluate, self.config.evaluate.batch_size
        sampler = ImageSampler(self.config, progress=False)
        eager = torch.compiler.set_stance("force_eager") if denoisers.compiled else nullcontext()
        images = []
        with generators_kept(processes.device), eager:
            with without_dropout(denoisers.policy) as policy, _under_autocast(policy, processes):
                pipeline = sampler.family.pipeline(
                    sampler.model, DTYPES[options.precision], denoiser=policy
                )
                pipeline.set_progress_bar_config(disable=True)
                for part in (p for p in pipeline.components.values() if isinstance(p, nn.Module)):
                    nn.Module.to(part, processes.device)
                for i in range(0, len(self.samples), size):
                    images += sampler.images(pipeline, self.samples[i : i + size])
                    processes.progress.at("sampling")
                del pipeline
        _release(processes.device)
        return images

    def _write(self, images: list[Image.Image], step: int) -> None:
        about = [{"prompt": s.prompt, "seed": s.seed, "file": s.file} for s in self.samples]
        with owned_folder(step_folder(self.folder, step), SAMPLES) as folder:
            for sample, image in zip(self.samples, images, strict=True):
                write_png(folder / sample.file, image)
            write_json(folder / SET, {"fingerprint": f"step {step}", "samples": about})


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Puts torch's own generators back behind the block; to load a model draws from them."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def _under_autocast(policy: nn.Module, processes: Processes) -> Iterator[None]:
    """Lets a policy answer pipelines in float32, computed in the precision of the run."""
    own = policy.forward

    def forward(*arguments: Any, **options: Any) -> tuple[Any, ...]:
        with processes.autocast():
            answer = own(*arguments, **{**options, "return_dict": False})
        return tuple(part.float() if isinstance(part, Tensor) else part for part in answer)

    before = policy.__dict__.get("forward")
    policy.forward = forward
    try:
        yield
    finally:
        if before is None:
            del policy.forward
        else:
            policy.forward = before


def _release(device: torch.device) -> None:
    """Gives a GPU's memory back that sampling has used."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _beside(base: Image.Image, policy: Image.Image) -> Image.Image:
    both = Image.new("RGB", (base.width + policy.width, max(base.height, policy.height)))
    both.paste(base, (0, 0))
    both.paste(policy, (base.width, 0))
    return both
