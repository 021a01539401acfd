"""Imports everything that a trial needs, in the process that all trials are forked from."""

import gc
from importlib import import_module

import tqdm.auto

# diffusers, transformers, peft and FastPO's own packages import these when they are first used.
for module in (
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "diffusers.schedulers.scheduling_euler_discrete",
    "fastpo.cli",
    "fastpo.data.prepare.latents",
    "fastpo.evaluate.compare",
    "fastpo.models.unet",
    "fastpo.reference_cache.compute",
    "fastpo.selftest.machine",
    "fastpo.selftest.run",
    "fastpo.testing.pipelines",
    "fastpo.train.loop",
    "peft.tuners.lora.bnb",
    "pyarrow.compute",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
):
    import_module(module)

# Made by each process that shows a bar, it would outlive those that are killed.
tqdm.auto.tqdm.get_lock()

gc.collect()
gc.freeze()  # a trial that collects its own garbage need not look at, and so copy, all of this
