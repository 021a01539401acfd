"""Intervals against worked numbers; sampling and scoring on tiny pipelines."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

import fastpo.evaluate.compare as evaluation
from fastpo.config import Config, parse_config
from fastpo.errors import CheckpointError, ConfigError
from fastpo.evaluate import win_rate
from fastpo.evaluate.compare import evaluate, score_folder, score_images
from fastpo.evaluate.sampling import LORA_FILE, ImageSampler, Sample, plan_samples
from fastpo.evaluate.win_rate import bootstrap_mean, compare_scores, wilson_interval
from fastpo.models.export import EXPORT_MANIFEST, export_fingerprint
from fastpo.system.checksums import checksum_of
from fastpo.system.manifest import write_manifest
from fastpo.testing import tiny_sd15_folder, tiny_sdxl_folder

PROMPTS = ["a cat", "two dogs", "seven"]


class Red:
    """Scores by the red channel and by a constant."""

    name = "red"

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        assert len(images) == len(prompts)
        red = [np.asarray(image, dtype=np.float64)[..., 0].mean() for image in images]
        return {"red": np.array(red), "constant": np.full(len(images), 7.0)}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl_folder(tmp_path_factory.mktemp("sdxl"))


def make_config(model: Path, run: Path, **options: Any) -> Config:
    options = {"prompts": PROMPTS, "seeds_per_prompt": 2, "num_inference_steps": 2} | options
    return parse_config(
        {
            "model": {"path": str(model)},
            "data": {"source": "folder", "path": "none"},
            "prepare": {"cache_dir": "none", "resolution": 32},
            "train": {"output_dir": str(run), "objective": {"name": "dpo"}, "max_steps": 1},
            "evaluate": options,
        }
    )


def export_lora(model: Path, final: Path) -> Path:
    """Writes a LoRA with large random weights in the format of the trainer's export."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "to_out.0"]))
    layers = get_peft_model_state_dict(unet)
    generator = torch.Generator().manual_seed(1)
    layers = {n: torch.randn(p.shape, generator=generator) for n, p in layers.items()}
    StableDiffusionPipeline.save_lora_weights(final, unet_lora_layers=layers)
    return final


def export_unet(model: Path, final: Path) -> Path:
    """Writes a UNet whose last bias moved."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    torch.nn.init.constant_(unet.conv_out.bias, 0.5)
    unet.save_pretrained(final / "unet")
    return final


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {p.name: np.asarray(Image.open(p), dtype=np.int16) for p in folder.glob("*.png")}


def test_wilson_worked_numbers() -> None:
    """Numbers as tabulated: 81 of 263 (Newcombe 1998), 15 of 148, 0 of 20, 1 of 29."""
    for wins, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(wins / n, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(0.5, 1, confidence=0.9)[0] > wilson_interval(0.5, 1)[0]
    with pytest.raises(ValueError, match="n > 0"):
        wilson_interval(0.5, 0)


def test_ties_count_half() -> None:
    summary = compare_scores([1, 1, 1, 1], [2, 1, 1, 0], [0, 0, 1, 1])
    assert (summary.wins, summary.ties, summary.losses) == (1, 2, 1)
    assert summary.win_rate == 0.5 and summary.gain == 0.0
    assert summary.win_interval == wilson_interval(0.5, 4)


def test_bootstrap_resamples_prompts() -> None:
    """Two prompts with gains 0 and 1: the mean is 0, 1/2 or 1 with chances 1/4, 1/2, 1/4."""
    values, prompts = np.repeat([0.0, 1.0], 50), np.repeat([0, 1], 50)
    assert bootstrap_mean(values, prompts, confidence=0.95) == (0.0, 1.0)
    assert bootstrap_mean(values, prompts, confidence=0.2) == (0.5, 0.5)
    assert bootstrap_mean(values, np.zeros(100)) is None


def test_bootstrap_repeats_and_agrees_with_theory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=400)
    interval = bootstrap_mean(values, np.arange(400))
    assert interval == bootstrap_mean(values, np.arange(400)) and interval is not None
    half = 1.96 * values.std() / 20
    assert interval == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)
    monkeypatch.setattr(win_rate, "RESAMPLES", 500)
    assert bootstrap_mean(values, np.arange(400)) != interval


def test_compare_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="vectors of one length"):
        compare_scores([1.0], [1.0, 2.0], [0])


def test_plan_gives_every_image_its_own_seed(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("seven\n\n  a Bär \n")
    config = make_config(tmp_path, tmp_path, prompts_file=str(file), first_seed=10)
    samples = plan_samples(config)
    assert [s.prompt for s in samples[::2]] == [*PROMPTS, "a Bär"]
    assert [s.seed for s in samples] == list(range(10, 18))
    with pytest.raises(ConfigError, match="nothing to sample: give evaluate"):
        plan_samples(make_config(tmp_path, tmp_path, prompts=[]))
    with pytest.raises(ConfigError, match=r"evaluate\.prompts_file: cannot read it"):
        plan_samples(make_config(tmp_path, tmp_path, prompts_file=str(tmp_path / "none")))


def test_images_on_disk_keep_their_settings(sdxl: Path, tmp_path: Path) -> None:
    """Name by name as release 0.1.0 wrote them, so that images made earlier are found again."""
    config = make_config(sdxl, tmp_path, height=16, guidance_scale=3.5, batch_size=3)
    settings = ImageSampler(config, progress=False).settings
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    assert settings == versions | {
        "family": "sdxl",
        "height": 16,
        "width": 32,
        "num_inference_steps": 2,
        "guidance_scale": 3.5,
        "precision": "fp32",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def test_an_untrained_run_says_so(sdxl: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="final does not exist; train first"):
        evaluate(make_config(sdxl, tmp_path), progress=False)
    (tmp_path / "final").mkdir()
    with pytest.raises(CheckpointError, match="holds neither"):
        evaluate(make_config(sdxl, tmp_path), progress=False)
    write_manifest(tmp_path / "final", {"lora": checksum_of(b"1")}, EXPORT_MANIFEST)
    (tmp_path / "final" / "lora").write_bytes(b"0")
    with pytest.raises(CheckpointError, match=r"final/lora is damaged.*--resume"):
        evaluate(make_config(sdxl, tmp_path), progress=False)
    assert not (tmp_path / "evaluation").exists()


def test_lora_run_end_to_end(sdxl: Path, tmp_path: Path) -> None:
    export_lora(sdxl, tmp_path / "final")
    result = evaluate(make_config(sdxl, tmp_path), scorers=[Red()], progress=False)
    folder = tmp_path / "evaluation"
    base, aligned = pixels(folder / "base"), pixels(folder / "aligned")
    assert base.keys() == aligned.keys() and len(base) == 6
    assert all((base[name] != aligned[name]).any() for name in base)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["primary"], summary["prompts"], summary["comparisons"]) == ("red", 3, 6)
    assert summary["metrics"]["constant"]["win_rate"] == 0.5
    red = result.metrics["red"]
    assert red.gain == pytest.approx(np.mean([aligned[n] - base[n] for n in base], (0, 1, 2))[0])
    rows = list(csv.DictReader((folder / "scores.csv").open()))
    assert len(rows) == 12 and {row["model"] for row in rows} == {"base", "aligned"}
    assert np.mean([float(r["red"]) for r in rows if r["model"] == "base"]) == pytest.approx(
        red.base_mean
    )
    about = json.loads((folder / "samples.json").read_text())
    weights = export_fingerprint(folder.parent / "final")
    assert about["aligned"] == {"folder": "final", "weights": weights, "step": None}
    listed = about["samples"]
    assert all((folder / row["aligned"]).is_file() for row in listed)
    assert {p.name for p in folder.glob(".*")} == {".fastpo", ".writer"}


def test_the_sampled_lora_is_the_exported_one(sdxl: Path, tmp_path: Path) -> None:
    """One image made again by hand, as the documentation says it can be."""
    final = export_lora(sdxl, tmp_path / "final")
    config = make_config(sdxl, tmp_path, prompts=["a cat"], seeds_per_prompt=1, first_seed=3)
    evaluate(config, scorers=[], progress=False)
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl, add_watermarker=False)
    pipeline.load_lora_weights(final)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a cat",
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(3),
    ).images[0]
    (made,) = pixels(tmp_path / "evaluation" / "aligned").values()
    assert np.abs(made - np.asarray(image, dtype=np.int16)).max() <= 1


def test_batch_size_does_not_change_images(sdxl: Path, tmp_path: Path) -> None:
    """Each image starts from its own noise; only float32 sums may round differently."""
    sets = []
    for size in (1, 4):
        config = make_config(sdxl, tmp_path, batch_size=size)
        folder = tmp_path / str(size)
        ImageSampler(config, progress=False).fill(folder, plan_samples(config), label="base")
        sets.append(pixels(folder))
    for name, image in sets[0].items():
        assert np.abs(image - sets[1][name]).max() <= 1
    different = list(sets[0].values())
    assert (different[0] != different[1]).any()


def test_full_sd15_run_shares_the_base(tmp_path: Path) -> None:
    model = tiny_sd15_folder(tmp_path / "model")
    shared = tmp_path / "shared"
    for name in ("one", "two"):
        export_unet(model, tmp_path / name / "final")
        config = make_config(model, tmp_path / name)
        result = evaluate(config, scorers=[Red()], progress=False, base_samples=shared)
        assert result.metrics["red"].wins + result.metrics["red"].losses == 6
    (store,) = shared.iterdir()
    first, second = (pixels(tmp_path / n / "evaluation" / "base") for n in ("one", "two"))
    stored = pixels(store)
    assert all((first[n] == stored[n]).all() and (second[n] == stored[n]).all() for n in stored)


def test_rerun_keeps_images_and_bytes(
    sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_unet(sdxl, tmp_path / "final")
    config = make_config(sdxl, tmp_path)
    evaluate(config, scorers=[Red()], progress=False)
    files = [p for p in (tmp_path / "evaluation").rglob("*") if p.is_file()]
    before = {p: p.read_bytes() for p in files}
    with monkeypatch.context() as patch:
        patch.setattr(ImageSampler, "_sample", None)  # a call would fail
        evaluate(config, scorers=[Red()], progress=False)
    assert before == {p: p.read_bytes() for p in files}


def test_new_weights_are_sampled_anew(sdxl: Path, tmp_path: Path) -> None:
    export_unet(sdxl, tmp_path / "final")
    config = make_config(sdxl, tmp_path, prompts=["a cat"])
    evaluate(config, scorers=[], progress=False)
    before = pixels(tmp_path / "evaluation" / "aligned")
    evaluate(config, aligned=export_lora(sdxl, tmp_path / "x"), scorers=[], progress=False)
    after = pixels(tmp_path / "evaluation" / "aligned")
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)


def test_an_interrupted_call_goes_on(
    sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(sdxl, tmp_path, batch_size=2)
    samples, sampler = plan_samples(config), ImageSampler(config, progress=False)
    images, made = sampler.images, []

    def killed(pipeline: Any, batch: list) -> list[Image.Image]:
        if made:
            raise KeyboardInterrupt
        made.extend(batch)
        return images(pipeline, batch)

    with monkeypatch.context() as patch:
        patch.setattr(sampler, "images", killed)
        with pytest.raises(KeyboardInterrupt):
            sampler.fill(tmp_path / "base", samples, label="base")
    assert not (tmp_path / "base").exists()
    seen = []
    monkeypatch.setattr(sampler, "images", lambda p, b: seen.extend(b) or images(p, b))
    assert sampler.fill(tmp_path / "base", samples, label="base")
    assert seen == samples[2:] and len(pixels(tmp_path / "base")) == 6
    assert not sampler.fill(tmp_path / "base", samples, label="base")


def test_scores_do_not_depend_on_how_many_are_read_at_once(
    sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(sdxl, tmp_path)
    samples = plan_samples(config)
    ImageSampler(config, progress=False).fill(tmp_path / "base", samples, label="base")
    whole = score_folder([Red()], tmp_path / "base", samples, progress=False)
    monkeypatch.setattr(evaluation, "SCORE_TOGETHER", 4)
    parts = score_folder([Red()], tmp_path / "base", samples, progress=False)
    assert whole["red"].tolist() == parts["red"].tolist() and len(whole["red"]) == 6


def test_other_precisions_sizes_and_refused_ones(sdxl: Path, tmp_path: Path) -> None:
    options = {"prompts": ["x"], "seeds_per_prompt": 1, "precision": "bf16", "width": 48}
    config = make_config(sdxl, tmp_path, **options)
    ImageSampler(config, progress=False).fill(tmp_path / "base", plan_samples(config), label="base")
    (image,) = pixels(tmp_path / "base").values()
    assert image.shape == (32, 48, 3) and image.std() > 0
    with pytest.raises(ConfigError, match="multiples of 8, got 32 and 50"):
        evaluate(make_config(sdxl, tmp_path, width=50), aligned=export_unet(sdxl, tmp_path / "x"))


def test_scorers_are_checked() -> None:
    class Short(Red):
        name = "short"

        def score(self, images: list, prompts: list) -> dict[str, np.ndarray]:
            return {"short": np.array([np.nan, 1.0])}

    image = Image.new("RGB", (2, 2))
    with pytest.raises(ConfigError, match="two scorers give a metric 'red'"):
        score_images([Red(), Red()], [image], ["x"])
    with pytest.raises(ConfigError, match="short must give one finite number per image"):
        score_images([Short()], [image, image], ["x", "y"])


def test_lora_file_has_the_name_others_expect(sdxl: Path, tmp_path: Path) -> None:
    assert (export_lora(sdxl, tmp_path) / LORA_FILE).is_file()


def test_slices_keep_the_images_of_a_prompt_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "SCORE_TOGETHER", 4)
    samples = [Sample(i, name, k) for i, name in enumerate("abc") for k in range(3)]
    whole = [len(part) for part in evaluation._slices(samples, whole_prompts=True)]
    assert whole == [6, 3]
    assert [len(part) for part in evaluation._slices(samples, whole_prompts=False)] == [4, 4, 1]
    assert list(evaluation._slices([], whole_prompts=True)) == []
