#!/usr/bin/env bash
# A scheduler that a pipeline has sampled with adds no noise afterwards, at any timestep.
#
# Versions: diffusers 0.42.1, torch 2.13.0, Python 3.11.
#
# What surprises: most pipelines call scheduler.set_begin_index(0). From then on scale_noise (flow
# matching) and add_noise (Euler, DPM-Solver++, UniPC) no longer look at the timesteps they are
# given: they take the sigma of the step where sampling stands. After the last step that is the
# final sigma, 0, so the "noisy" latents are the clean ones. No error, no warning. DDPM and DDIM
# schedulers have no such state. A copy by from_config is as new.
#
# Seen (weight of the noise at the four timesteps that a small Flux and SDXL pipeline sampled):
#   diffusers 0.42.1 torch 2.13.0+cpu
#   FlowMatchEulerDiscreteScheduler, new: 1.0000 0.6670 0.3340 0.0010
#   FlowMatchEulerDiscreteScheduler, after sampling: 0.0000 0.0000 0.0000 0.0000
#   FlowMatchEulerDiscreteScheduler, copy by from_config: 1.0000 0.6670 0.3340 0.0010
#   EulerDiscreteScheduler, new: 157.4073 9.4889 1.4624 0.0100
#   EulerDiscreteScheduler, after sampling: 0.0000 0.0000 0.0000 0.0000
#   EulerDiscreteScheduler, copy by from_config: 157.4073 9.4889 1.4624 0.0100
#
# Why it matters: a trainer that samples validation images between steps with the scheduler it adds
# noise with trains on clean latents from the first validation on: the loss jumps, or, with
# preferences, where winner and loser lose their noise alike, hardly shows it.
#
# What FastPO does: noise weights are tensors of their own, read once from alphas_cumprod; no sampling
# changes them.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
python=$work/venv/bin/python
install() { "$python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0

"$python" - <<'PYTHON'
import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

print("diffusers", diffusers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
vae = AutoencoderKL(latent_channels=4, norm_num_groups=1, block_out_channels=(8,))
transformer = FluxTransformer2DModel(
    patch_size=1,
    in_channels=16,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    pooled_projection_dim=16,
    axes_dims_rope=[4, 4, 8],
)
unet = UNet2DConditionModel(
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=32,
    attention_head_dim=8,
    norm_num_groups=8,
    sample_size=8,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 16,
)
flux = FluxPipeline(
    scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=transformer, **none
)
sdxl = StableDiffusionXLPipeline(
    scheduler=EulerDiscreteScheduler(), vae=vae, unet=unet, add_watermarker=False, **none
)
clean, noise = torch.zeros(4, 1, 1, 1), torch.ones(4, 1, 1, 1)


def weights(scheduler):
    scheduler.set_timesteps(4)
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(clean, scheduler.timesteps, noise).flatten()
    return scheduler.add_noise(clean, noise, scheduler.timesteps).flatten()


def used(scheduler):
    """The same without set_timesteps, as after the last step of sampling."""
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(clean, scheduler.timesteps, noise).flatten()
    return scheduler.add_noise(clean, noise, scheduler.timesteps).flatten()


for pipeline in (flux, sdxl):
    name = type(pipeline.scheduler).__name__
    pipeline.set_progress_bar_config(disable=True)
    before = weights(type(pipeline.scheduler).from_config(pipeline.scheduler.config))
    pipeline(
        prompt_embeds=torch.randn(1, 7, 32),
        pooled_prompt_embeds=torch.randn(1, 16),
        guidance_scale=1.0,
        height=16,
        width=16,
        num_inference_steps=4,
        output_type="latent",
    )
    after = used(pipeline.scheduler)
    copy = weights(type(pipeline.scheduler).from_config(pipeline.scheduler.config))
    for title, row in (("new", before), ("after sampling", after), ("copy by from_config", copy)):
        print(f"{name}, {title}:", *(f"{w:.4f}" for w in row.tolist()))
    if after.any():
        raise SystemExit(f"CHANGED: {name} adds noise after a pipeline has sampled")
    if not torch.equal(before, copy) or not (copy > 0).all():
        raise SystemExit(f"CHANGED: a copy of {name} by from_config does not add noise as a new one")
PYTHON
