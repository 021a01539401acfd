"""The definition of right: what a family answers is what diffusers' own pipeline computes.

A stock pipeline is run for one denoising step at a chosen place of the noise schedule. What its
scheduler's `step` receives is recorded, and latents of our making are given back in place of the
step's result, so that the pipeline's own last lines decode them. A family joins in by one `Case`.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastpo.config.sections import PrepareConfig
from fastpo.models.edits import source_condition
from fastpo.models.folder import ModelFolder
from fastpo.testing import image_bytes, tiny_sd15_folder, tiny_sdxl_folder
from fastpo.testing.flow import (
    tiny_flux_folder,
    tiny_flux_kontext_folder,
    tiny_sana_folder,
    tiny_sd3_folder,
)
from fastpo.testing.language_pipelines import (
    tiny_flux2_dev_folder,
    tiny_flux2_klein_folder,
    tiny_qwen_image_edit_folder,
    tiny_qwen_image_folder,
    tiny_z_image_folder,
)
from fastpo.types import NoisedPair

PROMPTS = ["a cat", "a small dog beside a red house"]
SIZE = 16, 24
"""Height and width of the images in pixels."""
SOURCES = (90, 50), (180, 101)
"""Width and height of the source images of both prompts: of another aspect than the images, and
alike, since the pairs of a batch have sources of one size."""

CUT_SOURCES = (96, 65), (99, 67)
"""FLUX.2 cuts what is beyond whole tokens."""
SECOND_SOURCES = (64, 80), (66, 83)


def two(first, second):
    """Two sources of different sizes for each of two prompts."""
    return {"sources": (first[0], second[0], first[1], second[1]), "together": 2}


def same(latents, pipeline, size):
    return latents


@dataclass(frozen=True, eq=False)
class Case:
    """A family under test.

    Attributes:
        name: Of the test.
        make: Writes the tiny pipeline's folder.
        scheduler: The pipeline's scheduler is replaced by one of this class, of its settings: some
            scale the latents before the model sees them, which is no business of the model's.
        guidance: `guidance_scale` of the pipeline's call: no classifier-free guidance.
        pack: `pack(latents, pipeline, size)`, latents `(B, C, h, w)` as `predict` takes them, in
            the layout of the pipeline's loop.
        unpack: The way back, for what the scheduler receives.
        enter: From latents to the layout in which the pipeline is called; default: `pack`.
        options: More arguments of the pipeline's call.
        pair_conditions: `pair_conditions(height, width)`: those of each pair.
        size: Height and width of the images in pixels.
        sources: Width and height of the prompts' source images, of families that edit; those of
            both prompts get one size where they share a batch.
        together: How many of them a prompt has.
        seen: Whether the text encoder sees them.
    """

    name: str
    make: Callable[[Path], Path]
    scheduler: str | None = None
    guidance: float = 1.0
    pack: Callable[..., Any] = same
    unpack: Callable[..., Any] = same
    enter: Callable[..., Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    pair_conditions: Callable[[int, int], dict[str, Any]] = lambda height, width: {}
    size: tuple[int, int] = SIZE
    sources: tuple[tuple[int, int], ...] = ()
    together: int = 1
    seen: bool = False


def sizes(height, width):
    """SDXL's: nothing was cropped."""
    return {"add_time_ids": torch.tensor([[height, width, 0, 0, height, width]] * 2).float()}


def tokens_of(latents, pipeline, size):
    """FLUX.1's: two by two latent pixels a token."""
    return pipeline._pack_latents(latents, *latents.shape)


def latents_of(tokens, pipeline, size):
    return pipeline._unpack_latents(tokens, *size, pipeline.vae_scale_factor)


def qwen_latents(tokens, pipeline, size):
    return pipeline._unpack_latents(tokens, *size, pipeline.vae_scale_factor).squeeze(2)


def flux2_tokens(latents, pipeline, size):
    return pipeline._pack_latents(latents)


def flux2_latents(tokens, pipeline, size):
    return tokens.mT.unflatten(2, [side // (2 * pipeline.vae_scale_factor) for side in size])


QWEN_EDIT = {"pack": tokens_of, "unpack": qwen_latents, "sources": SOURCES, "seen": True}
FLUX2 = {"pack": flux2_tokens, "unpack": flux2_latents, "enter": same}

CASES = (
    Case("sd15", tiny_sd15_folder, scheduler="DDIMScheduler"),
    Case("sdxl", tiny_sdxl_folder, scheduler="DDIMScheduler", pair_conditions=sizes),
    Case("sd3.5-medium", tiny_sd3_folder),
    Case("sd3.5-large", lambda path: tiny_sd3_folder(path, large=True)),
    Case("flux.1-dev", tiny_flux_folder, pack=tokens_of, unpack=latents_of),
    Case(
        "flux.1-kontext",
        tiny_flux_kontext_folder,
        pack=tokens_of,
        unpack=latents_of,
        sources=SOURCES,
    ),
    Case("sana", tiny_sana_folder, size=(32, 64)),
    Case("z-image", tiny_z_image_folder, guidance=0.0),
    Case("qwen-image", tiny_qwen_image_folder, pack=tokens_of, unpack=qwen_latents),
    Case("qwen-image-edit", tiny_qwen_image_edit_folder, **QWEN_EDIT),
    Case(
        "qwen-image-edit-2509",
        lambda path: tiny_qwen_image_edit_folder(path, plus=True),
        **QWEN_EDIT,
    ),
    Case(
        "qwen-image-edit-2511",
        lambda path: tiny_qwen_image_edit_folder(path, plus=True, zero_cond_t=True),
        **QWEN_EDIT,
    ),
    Case("flux2-klein", tiny_flux2_klein_folder, **FLUX2),
    Case("flux2-dev", tiny_flux2_dev_folder, **FLUX2),
    Case("flux2-klein-edit", tiny_flux2_klein_folder, **FLUX2, sources=CUT_SOURCES),
    Case("flux2-dev-edit", tiny_flux2_dev_folder, **FLUX2, sources=CUT_SOURCES),
    Case(
        "flux2-klein-two-sources",
        tiny_flux2_klein_folder,
        **FLUX2,
        **two(CUT_SOURCES, SECOND_SOURCES),
    ),
    Case(
        "qwen-image-edit-2511-two-sources",
        lambda path: tiny_qwen_image_edit_folder(path, plus=True, zero_cond_t=True),
        **QWEN_EDIT | two(SOURCES, SECOND_SOURCES),
    ),
)
EDITING = tuple(case for case in CASES if case.sources)


@dataclass
class Recorded:
    """What one step of a pipeline showed.

    Attributes:
        output: What the scheduler's `step` received as the model's answer.
        sample: The latents it received.
        timestep: The time it received.
        image: What the pipeline made of the latents given back, `(B, 3, H, W)` in [0, 1].
    """

    output: Any = None
    sample: Any = None
    timestep: Any = None
    image: Any = None


JOINED = ("output", "sample", "image")


def source_image(seed, size):
    """A source image as a user gives it."""
    return Image.open(io.BytesIO(image_bytes(seed, size))).convert("RGB")


class Stock:
    """A tiny pipeline of a case, and FastPO's parts of the same folder."""

    def __init__(self, case, folder):
        self.case = case
        self.model = ModelFolder(case.make(folder))
        self.family = self.model.family
        self.config = PrepareConfig(cache_dir=folder / "unused")
        self.pipeline = self.family.pipeline(self.model, torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)
        if case.scheduler is not None:
            import diffusers

            kind = getattr(diffusers, case.scheduler)
            self.pipeline.scheduler = kind.from_config(self.pipeline.scheduler.config)
        device = torch.device("cpu")
        self.encoders = self.family.load_encoders(self.model, self.config, device)
        self.denoiser = self.family.load_denoiser(self.model)
        self.schedule = self.family.schedule(self.model, case.size[0])
        images = [source_image(k, size) for k, size in enumerate(case.sources)]
        each = case.together
        self.sources = [images[k : k + each] for k in range(0, len(images), each)]

    def conditions(self, prompts=PROMPTS):
        """What `predict` is given for the prompts."""
        pairs = self.case.pair_conditions(*self.case.size)
        for place, images in enumerate(zip(*self.sources, strict=True)):
            pixels = torch.stack([self.encoders.source_pixels(image) for image in images])
            pairs[source_condition(place)] = self.encoders.encode_sources(pixels)
        return {**self.text(prompts), **pairs}

    def text(self, prompts):
        """What the prompts give, with their source images where the text encoder sees them."""
        if not self.family.text_sees_source:
            return self.encoders.encode_prompts(prompts)
        each = [
            self.encoders.encode_edit(prompt, images)
            for prompt, images in zip(prompts, self.sources, strict=False)
        ]
        return {name: torch.cat([one[name] for one in each]) for name in each[0]}

    def draw(self, seed):
        """Latents of both prompts' images as the denoiser sees them."""
        height, width = self.case.size
        factor, generator = self.encoders.vae_factor, torch.Generator().manual_seed(seed)
        pixels = torch.rand(2, 3, height, width, generator=generator) * 2 - 1
        mean, _ = self.encoders.encode_images(pixels)
        assert mean.shape[2:] == (height // factor, width // factor)
        return torch.randn(mean.shape, generator=generator)

    def step(self, latents, place, *, end=None, prompts=PROMPTS):
        """As `step_of`; with source images the pipelines take one prompt at a time."""
        if not self.sources:
            return self.step_of(latents, place, end, prompts, {})
        end, steps = latents if end is None else end, []
        for k, prompt in enumerate(prompts):
            own = slice(k, k + 1)
            source = self.family.edit_arguments(self.sources[k], *self.case.size)
            steps.append(self.step_of(latents[own], place, end[own], [prompt], source))
        joined = {name: torch.cat([getattr(s, name) for s in steps]) for name in JOINED}
        return Recorded(**joined, timestep=steps[0].timestep)

    def step_of(self, latents, place, end, prompts, source):
        """Runs the pipeline for one step at a place of our schedule.

        Args:
            latents: `(B, C, h, w)` noisy latents.
            place: Of the schedule.
            end: `(B, C, h, w)`, what the pipeline decodes at its end; default: `latents`.
            prompts: B prompts.
            source: The pipeline's arguments for the source image, if it edits.
        """
        recorded, scheduler, case = Recorded(), self.pipeline.scheduler, self.case
        size, (set_timesteps, step) = case.size, (scheduler.set_timesteps, scheduler.step)
        end = case.pack(latents if end is None else end, self.pipeline, size)

        @wraps(set_timesteps)  # pipelines look at what it takes
        def at_the_place(*args, **kwargs):
            set_timesteps(*args, **kwargs)
            scheduler.timesteps = self.time(place)
            scheduler.num_inference_steps = 1

        @wraps(step)
        def record(model_output, timestep, sample, *args, **kwargs):
            recorded.output = case.unpack(model_output, self.pipeline, size)
            recorded.sample = case.unpack(sample, self.pipeline, size)
            recorded.timestep = timestep
            return (end,)

        scheduler.set_timesteps, scheduler.step = at_the_place, record
        try:
            with torch.no_grad():
                recorded.image = self.pipeline(
                    **self.family.prompt_arguments(self.pipeline, prompts, self.config),
                    height=size[0],
                    width=size[1],
                    latents=(case.enter or case.pack)(latents, self.pipeline, size),
                    guidance_scale=case.guidance,
                    num_inference_steps=2,
                    output_type="pt",
                    **case.options,
                    **source,
                ).images
        finally:
            scheduler.set_timesteps, scheduler.step = set_timesteps, step
        return recorded

    def time(self, place):
        """The place as diffusers' schedulers count it: a whole number, or 1000 sigma."""
        if self.schedule.prediction == "flow":
            return 1000.0 * self.schedule.sigma[place : place + 1]
        return self.schedule.timesteps[place : place + 1]

    def noised(self, winners, losers, place):
        """The noisy pairs at a place; the target plays no part in a prediction."""
        latents = torch.cat((winners, losers))
        index = torch.full((len(winners),), place)
        return NoisedPair(latents, index, self.schedule.timesteps[index], latents)
