"""Imports everything that a trial needs, for the process that all trials are forked from."""

import diffusers.models.unets.unet_2d_condition
import diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl
import peft.tuners.lora.bnb
import pyarrow.compute
import torch
import tqdm.auto
import transformers
from diffusers import KarrasDiffusionSchedulers

import fastpo.data.prepare
import fastpo.evaluate.compare
import fastpo.models.unet
import fastpo.reference_cache.compute
import fastpo.selftest.storage
import fastpo.testing.pipelines
import fastpo.train.consolidate
import fastpo.train.loop

LOADED = (
    torch.nn.Module,
    diffusers.models.unets.unet_2d_condition.UNet2DConditionModel,
    diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl.StableDiffusionXLPipeline,
    KarrasDiffusionSchedulers,
    peft.LoraConfig,
    pyarrow.compute.take,
    transformers.CLIPTextModel,
    transformers.CLIPTextModelWithProjection,
    transformers.CLIPTokenizer,
    fastpo.data.prepare.prepare,
    fastpo.evaluate.compare.evaluate,
    fastpo.models.unet.SDXL,
    fastpo.reference_cache.compute.prepare_reference,
    fastpo.testing.pipelines.tiny_sdxl_folder,
    fastpo.train.consolidate.consolidate,
    fastpo.train.loop.train,
)
"""What transformers and diffusers import only when it is asked for by name."""

# Made by each process that shows a bar, it would outlive those that are killed.
tqdm.auto.tqdm.get_lock()
