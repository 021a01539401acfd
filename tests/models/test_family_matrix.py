"""Every family through a whole run: prepared, trained, resumed from a cache of errors, exported.

`fastpo train` is the same for all of them; what can differ is what a family hands to it. A quick
slice runs always, the whole matrix with `pytest -m long`.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastpo.config import parse_config
from fastpo.config.sections import EvaluateConfig
from fastpo.data.cache import PairCache
from fastpo.data.prepare import prepare
from fastpo.evaluate.sampling import ImageSampler, plan_samples
from fastpo.models.denoisers import add_lora, setup_denoisers
from fastpo.models.folder import ModelFolder
from fastpo.noise import setup_noise
from fastpo.reference_cache import prepare_reference
from fastpo.testing import write_folder
from fastpo.testing.edits import small_sources
from fastpo.train import train
from fastpo.train.consolidate import consolidate
from tests.models.family_cases import CASES

OBJECTIVES = {
    "dpo": {"objective": {"name": "dpo", "beta": 200.0}},
    "mapo": {"objective": {"name": "mapo"}},
    "adaptive": {
        "objective": {"name": "adaptive_dpo", "beta": 200.0},
        "annotators": {"kind": "ledger"},
    },
}
SLICE = [("lora", "dpo", "cached"), ("full", "adaptive", "live")]
WHOLE = [
    (method, objective, reference)
    for method in ("lora", "full")
    for objective in OBJECTIVES
    for reference in ("live", "cached")
    if (method, objective, reference) not in SLICE
    and (objective != "mapo" or reference == "live")  # it has no reference
]


TWINS = (
    *("sd3.5-large", "flux2-dev", "flux2-dev-edit"),
    *("qwen-image-edit-2509", "qwen-image-edit-2511"),
    *("flux2-klein-two-sources", "qwen-image-edit-2511-two-sources"),
)
"""Cases that differ from another one in `predict` alone, which is tested for itself."""


class World:
    """A tiny model of a case and its prepared pairs."""

    def __init__(self, case, folder):
        self.case, self.folder = case, folder
        self.path = case.make(folder / "model")
        sizes = (64, 64), (64, 64), (64, 64), (96, 56)
        write_folder(folder / "data", 4, sizes=sizes, sources=case.sources)
        self.runs = {}
        prepare(self.config("unused"), progress=False)

    def config(self, name, method="lora", **train):
        raw = {
            "seed": 3,
            "model": {"path": str(self.path)},
            "data": {"source": "folder", "path": str(self.folder / "data")},
            "prepare": {
                "cache_dir": str(self.folder / "cache"),
                "resolution": 64,
                "store_precision": "fp32",
            },
            "train": {
                "output_dir": str(self.folder / name),
                "objective": {"name": "sft"},
                "method": method,
                "optim": {"lr": 1e-3, "schedule": "constant"},
                "max_steps": 2,
                "micro_batch_size": 2,
                "precision": "fp32",
                "trackers": [],
            }
            | ({"lora": {"rank": 2, "alpha": 4.0}} if method == "lora" else {})
            | train,
        }
        return parse_config(raw)

    def run(self, method, objective, reference):
        """Trains once, and gives the losses, the run's folder and its configuration."""
        key = method, objective, reference
        if key not in self.runs:
            self.runs[key] = self._run(*key)
        return self.runs[key]

    def _run(self, method, objective, reference):
        options = {"method": method, **OBJECTIVES[objective]}
        name = f"{method}-{objective}-{reference}"
        config = self.config(name, **options, reference=reference)
        if reference == "cached":
            prepare_reference(config, progress=False)
        folder = train(config, progress=False)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines], folder, config


@pytest.fixture(
    scope="module",
    params=[case for case in CASES if case.name not in TWINS],
    ids=lambda case: case.name,
)
def world(request, tmp_path_factory):
    with small_sources():
        yield World(request.param, tmp_path_factory.mktemp(request.param.name))


@pytest.mark.parametrize(("method", "objective", "reference"), SLICE)
def test_a_run_ends_in_what_the_familys_own_pipeline_loads(world, method, objective, reference):
    assert_runs(world, method, objective, reference)


@pytest.mark.long
@pytest.mark.parametrize(("method", "objective", "reference"), WHOLE)
def test_every_other_way_of_training(world, method, objective, reference):
    assert_runs(world, method, objective, reference)


def assert_runs(world, method, objective, reference):
    losses, folder, config = world.run(method, objective, reference)
    again = consolidate(folder, folder / "again")
    assert len(losses) == 2
    assert all(torch.isfinite(torch.tensor(losses)))
    [checkpoint] = sorted((folder / "checkpoints").glob("step-*"))
    weights = load_file(checkpoint / "trainable.safetensors")
    for exported in (folder / "final", again):
        assert_the_pipeline_answers_as_the_policy(config, exported, weights)


def test_cached_errors_give_the_losses_of_a_live_reference(world):
    live, cached = (world.run("lora", "dpo", reference) for reference in ("live", "cached"))
    assert cached[0] == pytest.approx(live[0], rel=1e-4)
    lines = (live[1] / "metrics.jsonl").read_text().splitlines()
    moved = [json.loads(line)["error/winner"] for line in lines]  # over the reference's
    assert moved[0] == 0.0
    assert moved[-1] != 0.0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_in_bf16_the_reference_is_the_policy_before_training(world, method):
    """To the last bit, whatever layers autocast leaves: a rounded norm moves logits by order 1.

    A UNet's linear layers on a CPU round by how their weights lie in memory, by a bit of bf16; see
    `test_denoisers.py`.
    """
    config = world.config("unused", method, objective={"name": "dpo"}, precision="bf16")
    model = ModelFolder.resolve(config.model)
    denoiser = model.family.load_denoiser(model)
    denoisers = setup_denoisers(model.family, denoiser, config.train, needs_reference=True)
    _, batch, noised = a_batch(config, model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        policy = denoisers.predict(denoisers.policy, noised, batch.conditions)
        with denoisers.reference() as reference:
            found = denoisers.predict(reference, noised, batch.conditions)
    rounding = 0.03 if world.case.name in ("sd15", "sdxl") else 0.0
    torch.testing.assert_close(found, policy, atol=rounding, rtol=rounding)


def test_evaluation_samples_each_prompt_at_the_guidance_asked_for(world):
    scales, found = (1.0, 5.0), []
    for scale in scales:
        evaluation = {"prompts": ["a cat", "a red house"], "num_inference_steps": 2}
        if world.case.sources:
            evaluation["prompts"] = []
            evaluation["prompts_file"] = world.folder / "data" / "edits.jsonl"
            rows = [{"prompt": "a cat", "source": f"source{k}.png"} for k in range(2)]
            evaluation["prompts_file"].write_text("\n".join(map(json.dumps, rows)))
        evaluation |= {"guidance_scale": scale, "seeds_per_prompt": 1}
        config = world.config("unused")
        config = config.model_copy(update={"evaluate": EvaluateConfig(**evaluation)})
        sampler = ImageSampler(config, progress=False)
        images = sampler.images(sampler.pipeline, plan_samples(config))
        found.append(np.stack([np.asarray(image, dtype=np.int64) for image in images]))
    assert found[0].shape == (2, 64, 64, 3)
    assert not np.array_equal(*found[0])
    assert not np.array_equal(*found)


def assert_the_pipeline_answers_as_the_policy(config, final, weights):
    """What was exported, loaded by diffusers' own pipeline, against the trained weights."""
    model = ModelFolder.resolve(config.model)
    family, policy = model.family, model.family.load_denoiser(model)
    base, batch, noised = a_batch(config, model)
    with torch.no_grad():
        before = family.predict(policy, noised, batch.conditions)
        if config.train.method == "lora":
            add_lora(family, policy, config.train.lora)
            pipeline = family.pipeline(model, torch.float32)
            family.load_lora(pipeline, final)
        else:
            loaded = family.denoiser_class.from_pretrained(final / family.denoiser)
            pipeline = family.pipeline(model, torch.float32, loaded)
        assert policy.load_state_dict(weights, strict=False).unexpected_keys == []
        trained = family.predict(policy.eval(), noised, batch.conditions)
        exported = pipeline.components[family.denoiser].eval()
        found = family.predict(exported, noised, batch.conditions)
    torch.testing.assert_close(found, trained, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(trained, before, atol=1e-5)
    assert base.family == family.name


def a_batch(config, model):
    """A batch of the cache, noised as the run does."""
    cache = PairCache.open(config, model=model)
    batch = cache.read([0, 1], 0)
    return cache, batch, setup_noise(config, model).noised_pair(batch)
