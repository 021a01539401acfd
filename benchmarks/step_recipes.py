"""The steps that released trainers run, re-created from their description with stock diffusers.

Of UNets, all three encode images (VAE in float32) and prompts in every step. Diffusion-DPO adds a
forward of the reference. Adaptive-DPO adds two more, of moving averages that diffusers' `EMAModel`
swaps in by way of host memory, the whole UNet both ways. They are kept in the precision of the run,
to which released code casts them, although slow updates round away there. MaPO has neither. Two
things are left out in the recipes' favor: decoding and resizing the images, which those trainers do
in their data loaders (pixels are on the device already), and the graph that the averages' passes
build.

Of transformers there is Flow-Factory's offline DPO, whose prompts are cached: images are encoded in
every step, and policy and reference each see winner and loser in forward passes of their own. What
it copies to host memory between the two sides is left out in its favor; on a CPU it is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import EMAModel
from step_flow import predict_arm
from step_models import Inputs, encode_text
from torch import Tensor, nn

from fastpo.models.denoisers import Denoisers
from fastpo.precision import DTYPES

DECAYS = (0.9999, 0.5)  # of Adaptive-DPO's averages
Part = Callable[[str], Any]
Judge = Callable[[nn.Module], tuple[Tensor, Tensor]]


@dataclass
class Recipe:
    """What a released trainer holds.

    Attributes:
        denoisers: Policy and reference, as FastPO sets them up.
        optimizer: The policy's.
        scheduler: diffusers' noise schedule, of UNets.
        vae: In float32, frozen.
        text_encoders: In the precision of the run, frozen.
        autocast: Context of the policy's and the reference's forward.
        averages: diffusers' moving averages of the whole UNet, or none.
        logged: Values that the trainer reads back to the host for its log.
    """

    denoisers: Denoisers
    optimizer: torch.optim.Optimizer
    scheduler: DDPMScheduler
    vae: AutoencoderKL
    text_encoders: list[nn.Module]
    autocast: Callable[[], Any]
    averages: list[EMAModel]
    logged: list[float]

    def begin(self, inputs: Inputs, part: Part) -> Judge:
        """Encodes pixels and tokens and adds the pairs' noise.

        Returns:
            A function from a denoiser to its errors on winners and losers, `(B,)` each; the bench's
            hooks time the denoiser's forward.
        """
        with torch.no_grad():
            with part("VAE"):
                latents = self.vae.encode(inputs.pixels.float()).latent_dist.sample()  # pyright: ignore[reportAttributeAccessIssue]
                latents = latents * self.vae.config["scaling_factor"]
            with part("text"):
                embeds, pooled = encode_text(self.text_encoders, inputs.tokens)
        conditions: dict[str, Any] = {"encoder_hidden_states": embeds.repeat(2, 1, 1)}
        if pooled is not None:
            times = inputs.batch.conditions["add_time_ids"]
            conditions["added_cond_kwargs"] = {
                "text_embeds": pooled.repeat(2, 1),
                "time_ids": times.to(pooled.device).repeat(2, 1),
            }
        with part("noise"):
            pairs = len(latents) // 2
            noise = torch.randn_like(latents[:pairs]).repeat(2, 1, 1, 1)
            steps = torch.randint(1000, (pairs,), device=latents.device).repeat(2)
            noisy = self.scheduler.add_noise(latents, noise, steps)  # pyright: ignore[reportArgumentType]

        def judge(model: nn.Module) -> tuple[Tensor, Tensor]:
            with self.autocast():
                prediction = model(noisy, steps, **conditions, return_dict=False)[0]
            with part("loss"):
                squared = F.mse_loss(prediction.float(), noise.float(), reduction="none")
                winner, loser = squared.mean(dim=(1, 2, 3)).chunk(2)
            return winner, loser

        return judge

    def finish(self, loss: Tensor, part: Part) -> None:
        """Backward, clipping, update, the log's reads."""
        with part("backward"):
            loss.backward()
        with part("optimizer"):
            nn.utils.clip_grad_norm_(list(self.denoisers.trainable.values()), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            for average in self.averages:
                average.step(self.denoisers.policy.parameters())
        self.logged.append(loss.item())


def make_averages(unet: nn.Module, precision: str) -> list[EMAModel]:
    """Adaptive-DPO's averages of the whole UNet, frozen weights too, in the run's precision."""
    averages = []
    for decay in DECAYS:
        average = EMAModel(unet.parameters(), decay=decay)
        average.to(dtype=DTYPES[precision])
        averages.append(average)
    return averages


def diffusion_dpo(recipe: Recipe, inputs: Inputs, part: Part) -> None:
    """VAE, text, policy, reference, sigmoid loss, update."""
    judge = recipe.begin(inputs, part)
    e_w, e_l = judge(recipe.denoisers.policy)
    with torch.no_grad(), recipe.denoisers.reference() as reference:
        r_w, r_l = judge(reference)
    with part("loss"):
        margin = (r_w - r_l) - (e_w - e_l)
        loss = -F.logsigmoid(2500.0 * margin).mean()
        recipe.logged.append((margin > 0).float().mean().item())
    recipe.finish(loss, part)


def adaptive_dpo(recipe: Recipe, inputs: Inputs, part: Part) -> None:
    """Diffusion-DPO's step, and the two moving averages' opinions as weights."""
    judge = recipe.begin(inputs, part)
    unet = recipe.denoisers.policy
    e_w, e_l = judge(unet)
    with torch.no_grad():
        with recipe.denoisers.reference() as reference:
            r_w, r_l = judge(reference)
        margins = [((r_w - r_l) - (e_w - e_l)).detach()]
        for average in recipe.averages:
            with part("annotators"):
                average.store(unet.parameters())
                average.copy_to(unet.parameters())
            a_w, a_l = judge(unet)
            with part("annotators"):
                average.restore(unet.parameters())
            margins.append((r_w - r_l) - (a_w - a_l))
    with part("loss"):
        scaled = torch.stack([15.0 * d / d.norm().clamp_min(1e-12) for d in margins])
        doubt = (torch.sigmoid(scaled).mean(0) - 1).abs() * scaled.std(0).clamp(max=1.0)
        margin = (r_w - r_l) - (e_w - e_l)
        shift = margins[0].mean() - doubt.square() / 1000.0
        loss = -(F.logsigmoid(1000.0 * margin - shift) / (1.0 + 10.0 * doubt)).mean()
        recipe.logged.append((margin > 0).float().mean().item())
    recipe.finish(loss, part)


def mapo(recipe: Recipe, inputs: Inputs, part: Part) -> None:
    """VAE, text, policy, MaPO's loss as released (with `exp(x) - 1`), update."""
    judge = recipe.begin(inputs, part)
    e_w, e_l = judge(recipe.denoisers.policy)
    with part("loss"):
        odds = [0.5 * e / (torch.exp(0.5 * e) - 1) for e in (e_w, e_l)]
        ratio = F.logsigmoid(1000.0 * (odds[0] - odds[1]))
        loss = e_w.mean() - (0.1 * ratio).mean()
        recipe.logged.append((e_w < e_l).float().mean().item())
    recipe.finish(loss, part)


def flow_factory_dpo(recipe: Recipe, inputs: Inputs, part: Part) -> None:
    """VAE, policy and reference on winners and losers one after the other, sigmoid loss, update."""
    arms = inputs.pixels.float().chunk(2)
    with torch.no_grad(), part("VAE"):
        latents = [recipe.vae.encode(arm).latent_dist.sample() for arm in arms]  # pyright: ignore[reportAttributeAccessIssue]
        latents = [x * recipe.vae.config["scaling_factor"] for x in latents]
    with part("noise"):
        sigma = torch.sigmoid(torch.randn(len(latents[0]), device=latents[0].device))
        noise, share = torch.randn_like(latents[0]), sigma.view(-1, 1, 1, 1)
        noisy = [torch.lerp(x, noise, share) for x in latents]
        conditions = {k: v.to(noise.device) for k, v in inputs.batch.conditions.items()}

    def judge(model: nn.Module) -> list[Tensor]:
        errors = []
        for x, seen in zip(latents, noisy, strict=True):
            with recipe.autocast():
                answer = predict_arm(model, recipe.denoisers.family.name, seen, sigma, conditions)
            with part("loss"):
                errors.append((answer.float() - (noise - x)).square().mean(dim=(1, 2, 3)))
        return errors

    e_w, e_l = judge(recipe.denoisers.policy)
    with torch.no_grad(), recipe.denoisers.reference() as reference:
        r_w, r_l = judge(reference)
    with part("loss"):
        margin = (r_w - r_l) - (e_w - e_l)
        loss = -F.logsigmoid(1000.0 * margin).mean()
        recipe.logged.append((margin > 0).float().mean().item())
    recipe.finish(loss, part)


FLOW_RECIPES = {"Flow-Factory DPO": flow_factory_dpo}
RECIPES = {"Diffusion-DPO": diffusion_dpo, "MaPO": mapo, "Adaptive-DPO": adaptive_dpo}
