"""Scorers against direct computation with tiny random CLIP models."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, CLIPModel

from fastpo.errors import ConfigError, ModelError
from fastpo.evaluate.scorers import AestheticScorer, ClipScorer, PickScorer, Scorer, build_scorer
from fastpo.evaluate.scorers.loading import CLIP_H
from fastpo.testing import tiny_clip_folder

PROMPTS = ["a cat", "seven", "a very long prompt " * 20, "x", "two dogs"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8)) for _ in PROMPTS]


@torch.no_grad()
def direct(folder: Path, images: list[Image.Image]) -> tuple[np.ndarray, CLIPModel]:
    """Cosines one image at a time, from the two towers' features."""
    model, processor = CLIPModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    cosines = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        x = processor(
            text=[prompt], images=[image], truncation=True, max_length=77, return_tensors="pt"
        )
        seen = model.vision_model(pixel_values=x["pixel_values"]).pooler_output
        read = model.text_model(input_ids=x["input_ids"]).pooler_output
        pair = model.visual_projection(seen)[0], model.text_projection(read)[0]
        cosines.append(torch.cosine_similarity(*pair, dim=0).item())
    return np.array(cosines), model


def test_clip_is_a_hundred_cosines(clip_folder: Path, images: list[Image.Image]) -> None:
    scores = build_scorer(f"clip:{clip_folder}").score(images, PROMPTS)
    assert list(scores) == ["clip"] and scores["clip"].dtype == np.float64
    np.testing.assert_allclose(scores["clip"], 100 * direct(clip_folder, images)[0], atol=1e-4)


def test_pickscore_is_temperature_times_cosine(
    clip_folder: Path, images: list[Image.Image]
) -> None:
    cosines, model = direct(clip_folder, images)
    scores = build_scorer(f"pickscore:{clip_folder}").score(images, PROMPTS)
    assert list(scores) == ["pickscore"]
    expected = model.logit_scale.exp().item() * cosines
    np.testing.assert_allclose(scores["pickscore"], expected, atol=1e-5)


def test_batches_do_not_matter(clip_folder: Path, images: list[Image.Image]) -> None:
    whole = PickScorer(str(clip_folder)).score(images, PROMPTS)["pickscore"]
    pairs = PickScorer(str(clip_folder), batch_size=2).score(images, PROMPTS)["pickscore"]
    np.testing.assert_allclose(pairs, whole, atol=1e-5)


def test_gray_images_and_no_images(clip_folder: Path, images: list[Image.Image]) -> None:
    scorer = ClipScorer(str(clip_folder))
    gray = scorer.score([images[0].convert("L")], PROMPTS[:1])["clip"]
    assert gray.shape == (1,) and np.isfinite(gray).all()
    assert scorer.score([], [])["clip"].shape == (0,)
    with pytest.raises(ValueError, match="one prompt per image: got 1 and 2"):
        scorer.score(images[:1], PROMPTS[:2])


def test_aesthetic_head_is_linear_on_the_unit_embedding(
    clip_folder: Path, images: list[Image.Image], tmp_path: Path
) -> None:
    head = torch.nn.Sequential(
        torch.nn.Linear(12, 5), torch.nn.Dropout(), torch.nn.Linear(5, 1)
    ).eval()
    path = tmp_path / "head.pth"
    torch.save({f"layers.{k}": v for k, v in head.state_dict().items()}, path)
    scores = AestheticScorer(str(path), str(clip_folder)).score(images, PROMPTS)["aesthetic"]
    model, processor = (
        CLIPModel.from_pretrained(clip_folder),
        AutoProcessor.from_pretrained(clip_folder),
    )
    with torch.no_grad():
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        features = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        expected = head(features / features.norm(dim=-1, keepdim=True))[:, 0]
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-5)


def test_aesthetic_refuses_what_does_not_fit(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the head's weights"):
        build_scorer("aesthetic")
    with pytest.raises(ModelError, match="no such file"):
        AestheticScorer(str(tmp_path / "none.pth"), str(clip_folder))
    path = tmp_path / "head.pth"
    torch.save({"layers.0.weight": torch.zeros(1, 7), "layers.0.bias": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match=r"from 12 features to one number.*\(1, 7\)"):
        AestheticScorer(str(path), str(clip_folder))


def test_unknown_names_give_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown scorer 'pikscore'; did you mean 'pickscore'"):
        build_scorer("pikscore")
    with pytest.raises(ConfigError, match="colon but nothing after"):
        build_scorer("clip:")
    with pytest.raises(ConfigError, match="digits takes no argument"):
        build_scorer("digits:x")
    assert build_scorer("digits").name == "digits"


def test_a_missing_model_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"hf download .* --local-dir DIR.*\[clip:DIR\]"):
        build_scorer(f"clip:{tmp_path}")


def without_processor(clip_folder: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((clip_folder / name).read_bytes())
    return folder


def test_a_missing_processor_is_told_apart_from_missing_weights(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LAION's CLIP is no PickScore: as its weights it would score under PickScore's name."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = without_processor(clip_folder, tmp_path / "pick")
    with pytest.raises(ModelError) as refused:
        build_scorer(f"pickscore:{folder}")
    words = str(refused.value)
    assert "the processor that is missing, not the weights" in words
    assert f"hf download {CLIP_H} preprocessor_config.json" in words
    assert f"--local-dir {folder}`" in words
    assert "[pickscore:DIR]" not in words and "\n" not in words


@pytest.mark.parametrize(
    "path", ["laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openai/clip-vit-large-patch14", "cached"]
)
def test_another_model_is_not_called_pickscore(path: str, tmp_path: Path) -> None:
    if path == "cached":
        path = str(tmp_path / "models--laion--CLIP-ViT-H-14" / "snapshots" / "0123")
    with pytest.raises(ModelError, match=r"holds CLIP, not PickScore.*\[clip:"):
        build_scorer(f"pickscore:{path}")


def test_openclip_s_folder_is_not_called_pickscore(clip_folder: Path, tmp_path: Path) -> None:
    folder = without_processor(clip_folder, tmp_path / "h")
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds CLIP, not PickScore"):
        build_scorer(f"pickscore:{folder}")


def test_weights_that_lack_tensors_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items() if "text" in name}
    rest = {name: tensor for name, tensor in tensors.items() if "text" not in name}
    save_file(rest | wrapped, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"scorer clip: .* lacks \d+ keys .*'module\.'"):
        build_scorer(f"clip:{folder}")


@pytest.mark.parametrize("part", ["image size", "vocabulary"])
def test_a_processor_of_another_model_is_refused(
    clip_folder: Path, tmp_path: Path, part: str
) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    if part == "image size":
        path = next(folder.glob("*processor_config.json"))
        text = path.read_text().replace('"height": 16', '"height": 24')
        assert text != path.read_text()
        path.write_text(text)
        words = "it makes images of 24 pixels, the model takes 16"
    else:
        processor = AutoProcessor.from_pretrained(folder)
        processor.tokenizer.add_tokens(["<one more>"])
        processor.save_pretrained(folder)
        words = "its tokenizer has 515 tokens, the model knows 514"
    with pytest.raises(ModelError, match=f"is of another model than {folder}: {words}"):
        build_scorer(f"clip:{folder}")


def test_any_object_with_the_protocol_is_a_scorer(clip_folder: Path) -> None:
    class Constant:
        name = "constant"

        def score(self, images: list, prompts: list) -> dict[str, np.ndarray]:
            return {"constant": np.ones(len(images))}

    assert isinstance(Constant(), Scorer)
    assert isinstance(ClipScorer(str(clip_folder)), Scorer)
