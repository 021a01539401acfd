"""Text encoders of SD3 and FLUX.1 take turns: one at a time is in memory, with the same results."""

import gc
import weakref

import pytest
import torch

from fastpo.config.sections import PrepareConfig
from fastpo.models import encoders as loading
from fastpo.models.folder import ModelFolder
from fastpo.testing.flow import tiny_flux_folder, tiny_sd3_folder

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ["a cat", "", "a long prompt about nothing in particular", "a dog", "two red houses"]
FOLDERS = {"sd3": tiny_sd3_folder, "flux": tiny_flux_folder}
TEXTS = {
    "sd3": ["text_encoder", "text_encoder_2", "text_encoder_3"],
    "flux": ["text_encoder", "text_encoder_2"],
}


@pytest.fixture(scope="module", params=sorted(FOLDERS))
def model(request, tmp_path_factory):
    return ModelFolder(FOLDERS[request.param](tmp_path_factory.mktemp(request.param)))


@pytest.fixture
def loads(monkeypatch):
    """Names of the parts loaded, each with how many that were loaded before it were alive."""
    original, alive, seen = loading.load_part, [], []

    def load(kind, folder, name, **options):
        if name.startswith("text_encoder"):
            gc.collect()
            seen.append((name, sum(ref() is not None for ref in alive)))
        part = original(kind, folder, name, **options)
        if name.startswith("text_encoder"):
            alive.append(weakref.ref(part))
        return part

    monkeypatch.setattr(loading, "load_part", load)
    return seen


@pytest.fixture
def encoders(model, loads):
    config = PrepareConfig(cache_dir=model.path / "unused", text_length=8)
    return model.family.load_encoders(model, config, torch.device("cpu"))


def expected(model, prompts):
    """What the pipeline, which holds all of its encoders, gives."""
    pipeline = model.family.pipeline(model, torch.float32)
    with torch.no_grad():
        if model.family.name == "sd3":
            states, _, pooled, _ = pipeline.encode_prompt(
                prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=8
            )
        else:
            states, pooled, _ = pipeline.encode_prompt(prompts, None, max_sequence_length=8)
    return {"prompt_embeds": states, "pooled": pooled}


def test_one_encoder_is_alive_and_the_one_in_memory_goes_first(encoders, model, loads):
    texts = TEXTS[model.family.name]
    assert loads == [], "no prompt, no text encoder"
    assert len(list(encoders.encode_batches(PROMPTS, 2))) == 3
    assert loads == [(name, 0) for name in texts]
    list(encoders.encode_batches(PROMPTS[:2], 2))
    assert loads[len(texts) :] == [(name, 0) for name in texts[:-1]]
    encoders.place_texts("meta")  # off their device
    list(encoders.encode_batches(PROMPTS[:2], 2))
    assert loads[2 * len(texts) - 1 :] == [(name, 0) for name in texts]


def test_all_batches_are_to_the_bit_what_the_pipeline_gives(encoders, model):
    found = list(encoders.encode_batches(PROMPTS, 2))
    for batch, start in zip(found, (0, 2, 4), strict=True):
        for name, values in expected(model, PROMPTS[start : start + 2]).items():
            assert torch.equal(batch[name], values)
    assert all(map(torch.equal, encoders.encode_prompts(PROMPTS[:2]).values(), found[0].values()))


def test_no_prompt_loads_nothing(encoders, loads):
    assert list(encoders.encode_batches([], 2)) == []
    assert loads == []
