"""Tells style B from style A: a small convolutional network, fitted on names kept from no run.

It learns from all names except those that evaluations ask for, each picture varied, half of them
put through the base's autoencoder, so that it judges the style and not the autoencoder's blur. On
the held-out names its accuracy is measured, with and without the autoencoder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastpo.demo.base_training import rates, step
from fastpo.study.emoji.pictures import STYLES, Pictures, Pixels, draw_variation, to_tensor, vary
from fastpo.system.ownership import Kind, owned_folder

WEIGHTS, ABOUT = "judge.safetensors", "judge.json"
JUDGE = Kind(
    "the color world's judge of style",
    r"judge\.(safetensors|json)",
    lambda folder: (folder / ABOUT).is_file(),
)
CHUNK = 64  # images of one pass through the autoencoder


@dataclass(frozen=True, slots=True)
class JudgeRecipe:
    """How the judge is fitted."""

    steps: int = 300
    batch: int = 64
    lr: float = 3e-3


def network() -> nn.Sequential:
    """Returns the network: `(N, 3, S, S)` in [-1, 1] to `(N, 1)` logits of style B."""
    layers: list[nn.Module] = []
    for inside, outside, stride in ((3, 16, 1), (16, 32, 2), (32, 48, 2)):
        layers += [nn.Conv2d(inside, outside, 3, stride, 1), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 1))


class StyleJudge:
    """The fitted network.

    Attributes:
        accuracy: On held-out names: `pictures`, and `decoded` after the autoencoder.
    """

    def __init__(self, model: nn.Module, accuracy: dict[str, float]) -> None:
        self._model, self.accuracy = model.eval(), accuracy

    @classmethod
    def load(cls, folder: Path) -> StyleJudge:
        """Reads what `fit_judge` wrote."""
        model = network()
        model.load_state_dict(load_file(folder / WEIGHTS))
        return cls(model, json.loads((folder / ABOUT).read_text()))

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Returns `(N,)` log-odds of style B for `(N, 3, S, S)` images in [-1, 1]."""
        return torch.cat([self._model(part)[:, 0] for part in images.split(CHUNK)])

    def style_b(self, pixels: Pixels) -> NDArray[np.float64]:
        """Returns `(N,)`: how likely each `(N, S, S, 3)` uint8 image is in style B."""
        return self.logits(to_tensor(pixels)).sigmoid().double().numpy()


def fit_judge(
    out: Path,
    known: Pictures,
    held_out: Pictures,
    vae: AutoencoderKL,
    *,
    recipe: JudgeRecipe | None = None,
    seed: int = 0,
) -> StyleJudge:
    """Fits the network, measures it, and writes it to a folder of its own.

    Args:
        out: The folder, replaced if it is there.
        known: What it learns from; the names of `held_out` are left out.
        held_out: What it is measured on.
        vae: The base's autoencoder.
        recipe: Length and rate.
        seed: Of weights and batches.

    Raises:
        ForeignPathError: `out` holds something else.
    """
    recipe = recipe or JudgeRecipe()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        other = [k for k, name in enumerate(known.names) if name not in held_out.names]
        model = network()
        images, labels = _examples(known, other, vae)
        _fit(model, images, labels, recipe)
        tests, answers = _examples(held_out, list(range(len(held_out))), vae)
        right = ((StyleJudge(model, {}).logits(tests) > 0) == (answers > 0.5)).float()
        plain, decoded = right.chunk(2)
    accuracy = {"pictures": plain.mean().item(), "decoded": decoded.mean().item()}
    with owned_folder(out, JUDGE) as folder:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / WEIGHTS)
        (folder / ABOUT).write_text(json.dumps(accuracy))
    return StyleJudge(model, accuracy)


def _fit(model: nn.Module, images: Tensor, labels: Tensor, recipe: JudgeRecipe) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.01)
    model.train()
    for rate in rates(recipe.lr, recipe.steps):
        rows = torch.randint(len(images), (recipe.batch,))
        answer = model(images[rows])[:, 0]
        step(optimizer, model, F.binary_cross_entropy_with_logits(answer, labels[rows]), rate)
    model.eval().requires_grad_(False)


@torch.no_grad()
def _examples(pictures: Pictures, rows: list[int], vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """Variants of both styles as they are, then through the autoencoder; 1 labels style B."""
    images = torch.cat([to_tensor(pictures.styles[style][rows]) for style in STYLES])
    images = vary(images, draw_variation(len(images)))
    labels = torch.arange(2.0).repeat_interleave(len(rows))
    decoded = [_through(vae, part) for part in images.split(CHUNK)]
    return torch.cat([images, *decoded]), torch.cat([labels, labels])


def _through(vae: AutoencoderKL, images: Tensor) -> Tensor:
    latents = vae.encode(images).latent_dist.mean  # pyright: ignore[reportAttributeAccessIssue]
    return vae.decode(latents).sample.clamp(-1.0, 1.0)  # pyright: ignore[reportAttributeAccessIssue]
