"""Imports everything that a trial needs, in the process that all trials are forked from."""

import gc
import threading
from importlib import import_module

import tqdm.std

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

# By default the bars of all processes share one lock, and wait for it when its holder is killed.
tqdm.std.tqdm.set_lock(threading.RLock())

gc.collect()
gc.freeze()  # a trial that collects its own garbage need not look at, and so copy, all of this
