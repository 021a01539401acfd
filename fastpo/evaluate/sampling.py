"""Images from the base and from the aligned model, for the same prompts and seeds.

Every image has its own generator on the CPU, seeded with the image's own seed: neither the batch
size nor the device changes the noise it starts from, and
`pipeline(prompt, generator=torch.Generator("cpu").manual_seed(seed), ...)` makes it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

from fastpo.config import Config, decided_values
from fastpo.errors import CheckpointError, ConfigError, DataError, one_line
from fastpo.evaluate.folders import SAMPLES, SET, partial_folder
from fastpo.evaluate.samples import Sample as Sample
from fastpo.evaluate.samples import described, opened
from fastpo.evaluate.samples import list_samples as list_samples
from fastpo.evaluate.samples import plan_samples as plan_samples
from fastpo.models.export import EXPORT_MANIFEST, LORA_FILE, export_damage
from fastpo.models.family import ModelFamily
from fastpo.models.folder import ModelFolder, component_files, digest_files
from fastpo.models.weights import load_component
from fastpo.precision import DTYPES
from fastpo.system.checksums import checksum
from fastpo.system.files import is_temporary, sweep, whole_file, write_json
from fastpo.system.json_text import read_json
from fastpo.system.ownership import (
    check_replaceable,
    claim,
    is_ours,
    put_in_place,
    remove_owned,
)
from fastpo.system.process import default_device
from fastpo.system.progress import progress_bar

# Keys whose content the fingerprint holds instead: weights, prompts, seeds, and the images' size.
BY_CONTENT = (
    *("model.path", "model.config", "model.revision", "model.variant", "model.vae"),
    "prepare.resolution",
    *("evaluate.prompts", "evaluate.prompts_file", "evaluate.prompt_sets"),
    *("evaluate.prompts_per_set", "evaluate.seeds_per_prompt"),
    *("evaluate.first_seed", "evaluate.height", "evaluate.width"),
)


class ImageSampler:
    """Makes images with the pipeline of a configuration; loads it when the first one is needed.

    Args:
        config: The experiment.
        progress: Whether a progress bar is shown.

    Raises:
        ModelError: The pipeline is not available, or of a family that FastPO does not know.
    """

    def __init__(self, config: Config, *, progress: bool = True) -> None:
        self.config = config
        self.progress = progress
        self.model = ModelFolder.resolve(config.model)
        self.family = self.model.family
        self.device = default_device()

    def check(self, samples: Sequence[Sample]) -> None:
        """Refuses what the pipeline does not make.

        Raises:
            ConfigError: As `settings`.
            DataError: The family edits and a sample has no source image, or the other way round; or
                a sample has more of them than the family takes.
        """
        _ = self.settings
        for sample in samples:
            self.family.check_edits(len(sample.sources), "evaluate.prompts")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything besides prompts, seeds and weights that decides how an image looks.

        Of the configuration these are the keys with `decides("images")`.

        Raises:
            ConfigError: The size is none that these pipelines make.
        """
        options, side = self.config.evaluate, self.config.prepare.resolution
        height, width = options.height or side, options.width or side
        if height % 8 or width % 8:
            raise ConfigError(
                f"evaluate.height and evaluate.width (default: prepare.resolution) must be "
                f"multiples of 8, got {height} and {width}"
            )
        values = decided_values(self.config, "images", named=BY_CONTENT)
        return {
            "family": self.family.name,
            "height": height,
            "width": width,
            **{key.removeprefix("evaluate."): value for key, value in values.items()},
            "device": self.device.type,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        }

    @cached_property
    def weights(self) -> dict[str, str]:
        """Digests of the base pipeline's components."""
        names = (self.family.denoiser, "vae", *self.family.encoder_parts, "scheduler")
        return {
            name: self.model.digest(name).sha256
            for name in names
            if self.model.component(name).is_dir()
        }

    def fingerprint(self, samples: Sequence[Sample], aligned: Path | None = None) -> str:
        """Returns the name of what will be made: equal ones mean equal images."""
        self.check(samples)
        content: dict[str, Any] = {
            "settings": self.settings,
            "weights": self.weights,
            "samples": [described(sample) for sample in samples],
        }
        if aligned is not None:
            file = aligned / LORA_FILE
            files = [file] if file.is_file() else component_files(aligned / self.family.denoiser)
            content["aligned"] = digest_files(files)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def fill(
        self, folder: Path, samples: Sequence[Sample], *, label: str, aligned: Path | None = None
    ) -> bool:
        """Puts one PNG per sample into `folder`, unless it holds these very images already.

        An interrupted call leaves what it made beside `folder`, and the next one continues there;
        `folder` itself appears, or changes, whole.

        Args:
            folder: Where to.
            samples: What to make.
            label: Name of the model on the progress bar.
            aligned: Folder with the aligned LoRA or denoiser; None for the base.

        Returns:
            Whether anything had to be sampled.

        Raises:
            ForeignPathError: `folder` holds something else, or more than images sampled earlier.
        """
        fingerprint = self.fingerprint(samples, aligned)
        if folder.parent.is_dir():
            sweep(folder.parent)
        if holds_samples(folder, samples, fingerprint):
            return False
        self.make(folder, samples, samples, label=label, aligned=aligned)
        self.put_together(folder, samples, aligned)
        return True

    def make(
        self,
        folder: Path,
        samples: Sequence[Sample],
        some: Sequence[Sample],
        *,
        label: str,
        aligned: Path | None = None,
    ) -> None:
        """Makes some of a folder's images beside it, where they wait for the others.

        Args:
            folder: Where all of them will be.
            samples: All of them.
            some: Those to make, unless they are there.
            label: Name of the model on the progress bar.
            aligned: As for `fill`.

        Raises:
            ForeignPathError: As `fill`.
        """
        check_replaceable(folder, SAMPLES)
        partial = partial_folder(folder, self.fingerprint(samples, aligned))
        claim(partial, SAMPLES)
        missing = [sample for sample in some if not (partial / sample.file).exists()]
        if missing:
            self._sample(partial, missing, len(some), label, aligned)

    def put_together(
        self, folder: Path, samples: Sequence[Sample], aligned: Path | None = None
    ) -> None:
        """Moves images that are all made to their folder, and removes what earlier calls left.

        Raises:
            ForeignPathError: As `fill`.
            FileNotFoundError: An image is missing.
        """
        fingerprint = self.fingerprint(samples, aligned)
        partial = partial_folder(folder, fingerprint)
        sums = {sample.file: checksum(partial / sample.file).xxh3 for sample in samples}
        marker = {"fingerprint": fingerprint, "settings": self.settings, "images": len(samples)}
        marker["files"] = sums
        marker["prompts"] = {sample.file: sample.prompt for sample in samples}
        write_json(partial / SET, marker)
        put_in_place(partial, folder, SAMPLES)
        for stale in folder.parent.glob(f".{folder.name}.partial-*"):
            if not is_temporary(stale.name) and is_ours(stale, SAMPLES):
                remove_owned(stale, SAMPLES)

    def _sample(
        self, folder: Path, missing: list[Sample], total: int, label: str, aligned: Path | None
    ) -> None:
        size = self.config.evaluate.batch_size
        with (
            self._aligned(aligned) as pipeline,
            progress_bar(
                f"sample {label}",
                total,
                unit="images",
                done=total - len(missing),
                show=self.progress,
            ) as advance,
        ):
            for i in range(0, len(missing), size):
                batch = missing[i : i + size]
                for sample, image in zip(batch, self.images(pipeline, batch), strict=True):
                    write_png(folder / sample.file, image)
                advance(len(batch))

    @torch.inference_mode()
    def images(self, pipeline: Any, batch: Sequence[Sample]) -> list[Image.Image]:
        """Makes images with a pipeline that is on its device."""
        if len(batch) > 1 and any(sample.sources for sample in batch):
            # Their pipelines take the sources of one prompt at a time.
            return [image for sample in batch for image in self.images(pipeline, [sample])]
        settings = self.settings
        prompts = [sample.prompt for sample in batch]
        return pipeline(
            **self._sources(batch[0]),
            **self.family.prompt_arguments(pipeline, prompts, self.config.prepare),
            height=settings["height"],
            width=settings["width"],
            num_inference_steps=settings["num_inference_steps"],
            **self.family.guidance_arguments(settings["guidance_scale"], len(batch)),
            generator=[torch.Generator("cpu").manual_seed(sample.seed) for sample in batch],
        ).images

    def _sources(self, sample: Sample) -> dict[str, Any]:
        if not sample.sources:
            return {}
        images = [*map(opened, sample.sources)]
        return self.family.edit_arguments(images, self.settings["height"], self.settings["width"])

    @cached_property
    def pipeline(self) -> Any:
        """The base pipeline, without what would alter images."""
        pipeline = self.family.pipeline(self.model, DTYPES[self.config.evaluate.precision])
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.device)

    def drop_pipeline(self) -> None:
        """Frees the pipeline's memory; the next image loads it again."""
        self.__dict__.pop("pipeline", None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _aligned(self, folder: Path | None) -> Iterator[Any]:
        """Gives the pipeline with the aligned weights in it, and takes them out again."""
        pipeline = self.pipeline
        if folder is None:
            yield pipeline
        elif (folder / LORA_FILE).is_file():
            self.family.load_lora(pipeline, folder)
            # diffusers makes the adapters' layers in training mode: a dropout would be at work
            pipeline.components[self.family.denoiser].eval()
            try:
                yield pipeline
            finally:
                pipeline.unload_lora_weights()
        else:
            name = self.family.denoiser
            base = pipeline.components[name]
            what = f"{folder / name} could not be loaded"
            aligned = load_component(
                type(base), folder, what=what, subfolder=name, dtype=base.dtype
            )
            base.to("cpu")
            setattr(pipeline, name, aligned.to(self.device))
            try:
                yield pipeline
            finally:
                setattr(pipeline, name, base.to(self.device))


def check_aligned(folder: Path, family: ModelFamily) -> Path:
    """Returns `folder` if it holds what training exports.

    Raises:
        CheckpointError: It does not exist or holds neither a LoRA nor a denoiser, or a file of it
            is not as it was exported.
    """
    if (folder / EXPORT_MANIFEST).is_file() and (damage := export_damage(folder)):
        raise CheckpointError(
            f"{damage}; `fastpo train CONFIG --resume` writes it again from the last checkpoint"
        )
    if (folder / LORA_FILE).is_file() or (folder / family.denoiser / "config.json").is_file():
        return folder
    nothing = f"holds neither {LORA_FILE} nor {family.denoiser}/"
    reason = nothing if folder.is_dir() else "does not exist"
    raise CheckpointError(
        f"no aligned model: {folder} {reason}; train first (fastpo train CONFIG), to the end, or "
        "name a checkpoint or an unfinished run by --weights"
    )


def holds_samples(folder: Path, samples: Sequence[Sample], fingerprint: str) -> bool:
    """Tells whether `folder` holds all images made under `fingerprint`, as they were made.

    Sets of versions that wrote no checksums are only looked at.
    """
    try:
        marker = read_json(folder / SET, most_bytes=1 << 26)
    except (OSError, ValueError):
        return False
    if not isinstance(marker, dict) or marker.get("fingerprint") != fingerprint:
        return False
    sums = marker.get("files")
    files = [sample.file for sample in samples]
    if not isinstance(sums, dict):
        return all((folder / file).is_file() for file in files)
    try:
        return all(checksum(folder / file).xxh3 == sums.get(file) for file in files)
    except FileNotFoundError:
        return False


def read_images(folder: Path, samples: Sequence[Sample]) -> list[Image.Image]:
    """Returns the images of a filled folder, in order.

    Raises:
        DataError: One is damaged.
    """
    images = []
    for sample in samples:
        try:
            with Image.open(folder / sample.file, formats=("PNG",)) as image:
                images.append(image.convert("RGB"))
        except MemoryError:
            raise
        except Exception as error:  # PIL's plug-ins raise anything on broken data
            raise DataError(
                f"{folder / sample.file} cannot be read ({one_line(error)}); remove {folder}, and "
                "evaluate again"
            ) from None
    return images


def write_png(path: Path, image: Image.Image) -> None:
    """Writes an image whole or not at all."""
    with whole_file(path) as temporary:
        image.save(temporary, format="PNG")
