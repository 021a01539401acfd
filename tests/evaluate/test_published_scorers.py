"""Scorers that load a checkpoint as its authors publish it, against plain torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, CLIPModel, Qwen2VLImageProcessorPil

from fastpo.errors import ConfigError, ModelError
from fastpo.evaluate.scorers import build_scorer
from fastpo.evaluate.scorers.hps3 import text_of
from fastpo.evaluate.scorers.preprocess import cropped, padded
from fastpo.testing import tiny_clip_folder
from fastpo.testing.pipelines import clip_tokenizer
from tests.evaluate.published import (
    ImageReward,
    OpenClip,
    write_hps,
    write_hps3,
    write_image_reward,
)

PROMPTS = ["a cat", "seven", "a very long prompt " * 20, "x", "a cat"]
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 24, 3), np.uint8)) for _ in PROMPTS]


@pytest.fixture(scope="module")
def hps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OpenClip]:
    folder = tmp_path_factory.mktemp("hps")
    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(folder)
    return folder, write_hps(folder, "HPS_v2.1_compressed.pt", len(tokenizer))


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ImageReward]:
    folder = tmp_path_factory.mktemp("reward")
    return folder, write_image_reward(folder)


@torch.no_grad()
def test_hps_is_a_hundred_cosines_of_openclip(
    hps: tuple[Path, OpenClip], images: list[Image.Image]
) -> None:
    folder, model = hps
    scores = build_scorer(f"hpsv2.1:{folder}", batch_size=2).score(images, PROMPTS)
    assert list(scores) == ["hpsv2.1"]
    tokenizer = clip_tokenizer()
    for score, image, prompt in zip(scores["hpsv2.1"], images, PROMPTS, strict=True):
        tokens = tokenizer(prompt, truncation=True, max_length=20, return_tensors="pt")
        seen = model.visual(padded(image, 16)[None])
        read = model.encode_text(tokens["input_ids"])
        assert score == pytest.approx(100 * torch.cosine_similarity(seen, read).item(), abs=1e-3)
    assert np.ptp(scores["hpsv2.1"]) > 1


def test_hps_in_half_precision_is_near(
    hps: tuple[Path, OpenClip], images: list[Image.Image]
) -> None:
    whole = build_scorer(f"hpsv2.1:{hps[0]}").score(images, PROMPTS)["hpsv2.1"]
    scorer = build_scorer(f"hpsv2.1:{hps[0]}", precision="bf16")
    half = scorer.score(images, PROMPTS)["hpsv2.1"]
    assert 0 < np.abs(half - whole).max() < 3.0  # of -100 to 100; bf16 has eight bits


def test_the_two_versions_are_told_apart(hps: tuple[Path, OpenClip], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no HPS_v2_compressed\.pt"):
        build_scorer(f"hpsv2:{hps[0]}")
    with pytest.raises(ModelError, match=r"the other version; its scorer is hpsv2\.1"):
        build_scorer(f"hpsv2:{hps[0] / 'HPS_v2.1_compressed.pt'}")
    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    write_hps(tmp_path, "HPS_v2_compressed.pt", len(tokenizer))
    assert build_scorer(f"hpsv2:{tmp_path}").name == "hpsv2"


def test_a_checkpoint_of_another_model_is_refused(
    hps: tuple[Path, OpenClip], tmp_path: Path
) -> None:
    file = tmp_path / "HPS_v2.1_compressed.pt"
    state = hps[1].state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, file)
    with pytest.raises(ModelError, match=r"lacks 'visual\.conv1\.weight'"):
        build_scorer(f"hpsv2.1:{file}")
    wrong = {k: v for k, v in state.items() if "ln_final" not in k}
    torch.save({"state_dict": wrong}, file)
    with pytest.raises(ModelError, match=r"lacks 2 keys \(text_model\.final_layer_norm"):
        build_scorer(f"hpsv2.1:{file}")
    torch.save({"state_dict": state, "args": Path("x")}, file)
    with pytest.raises(ModelError, match="cannot be read as weights alone"):
        build_scorer(f"hpsv2.1:{file}")
    torch.save({"names": ["a"]}, file)
    with pytest.raises(ModelError, match="no mapping of names to tensors"):
        build_scorer(f"hpsv2.1:{file}")


@torch.no_grad()
def test_image_reward_is_blip_with_a_head(
    reward: tuple[Path, ImageReward], images: list[Image.Image]
) -> None:
    folder, model = reward
    scorer = build_scorer(f"imagereward:{folder}", batch_size=3)
    scores = scorer.score(images, PROMPTS)
    assert list(scores) == ["imagereward"]
    tokens = AutoProcessor.from_pretrained(folder)(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    assert not tokens["attention_mask"].all()
    pixels = torch.stack([cropped(image, 32) for image in images])
    expected = model(pixels, tokens["input_ids"], tokens["attention_mask"])
    np.testing.assert_allclose(scores["imagereward"], expected.numpy(), atol=1e-5)
    assert np.ptp(scores["imagereward"]) > 0.01


def test_image_reward_refuses_other_checkpoints(
    reward: tuple[Path, ImageReward], tmp_path: Path
) -> None:
    file, state = tmp_path / "ImageReward.pt", reward[1].state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith("mlp")}, file)
    with pytest.raises(ModelError, match="lacks its head"):
        build_scorer(f"imagereward:{tmp_path}")
    torch.save(state | {"itm_head.weight": torch.zeros(2)}, file)
    with pytest.raises(ModelError, match=r"has unexpected 1 key \(itm_head\.weight\)"):
        build_scorer(f"imagereward:{tmp_path}")
    torch.save({k: v for k, v in state.items() if "crossattention" not in k}, file)
    with pytest.raises(ModelError, match="lacks 20 keys"):
        build_scorer(f"imagereward:{tmp_path}")
    with pytest.raises(ModelError, match="no such file or folder"):
        build_scorer(f"imagereward:{tmp_path / 'none.pt'}")


@torch.no_grad()
def test_hps3_reads_the_state_at_the_rewards_token(tmp_path: Path) -> None:
    """Each image alone, by the library's own calls, with all of the released text behind it."""
    network, head, tokenizer = write_hps3(tmp_path)
    rng = np.random.default_rng(1)
    sizes = [(448, 448), (30, 60)]
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]
    prompts = ["a cat", "a much longer prompt with {braces} and <|im_end|>"]
    scorer = build_scorer(f"hpsv3:{tmp_path}", batch_size=2)
    scores = scorer.score(images, prompts)["hpsv3"]
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    size = {"shortest_edge": 200704, "longest_edge": 200704}
    processor = Qwen2VLImageProcessorPil(size=size)
    for image, prompt, score in zip(images, prompts, scores, strict=True):
        seen = processor(images=image, return_tensors="pt")
        grid = seen["image_grid_thw"]
        text = (
            text_of(prompt, int(grid.prod()) // 4) + "\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        hidden = network(
            input_ids=ids,
            pixel_values=seen["pixel_values"],
            image_grid_thw=grid,
            position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1),
        ).last_hidden_state
        (place,) = (ids[0] == len(tokenizer) - 1).nonzero().flatten().tolist()
        assert score == pytest.approx(head(hidden[0, place])[0].item(), abs=1e-5)
    assert np.ptp(scores) > 1e-3
    half = build_scorer(f"hpsv3:{tmp_path}", precision="bf16")
    assert 0 < abs(half.score(images[:1], prompts[:1])["hpsv3"][0] - scores[0]) < 0.1


def test_hps3_refuses_other_checkpoints(tmp_path: Path) -> None:
    _, _, tokenizer = write_hps3(tmp_path)
    file = tmp_path / "HPSv3.safetensors"
    whole = load_file(file)
    for change, told in (
        (
            {"rm_head.0.weight": torch.zeros(24, 31)},
            r"the head of .* must be linear layers 0, 3, 5",
        ),
        ({"visual.merger.ln_q.weight": None}, r"lacks 1 key \(visual\.merger\.ln_q\.weight\)"),
        ({"model.strange": torch.zeros(1)}, "language_model.strange"),
        ({"model.embed_tokens.weight": torch.zeros(400, 32)}, r"has 400 tokens, its tokenizer \d+"),
    ):
        state = {n: t for n, t in {**whole, **change}.items() if t is not None}
        save_file(state, file)
        with pytest.raises(ModelError, match=told):
            build_scorer(f"hpsv3:{tmp_path}")
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") < len(tokenizer)
    with pytest.raises(ModelError, match=r"holds no HPSv3\.safetensors"):
        build_scorer(f"hpsv3:{tmp_path.parent}")


def test_padding_resizes_the_longer_edge() -> None:
    white = Image.new("RGBA", (30, 60), "white")
    seen = padded(white, 16).numpy().transpose(1, 2, 0) * STD + MEAN
    assert seen.shape == (16, 16, 3)
    np.testing.assert_allclose(seen[:, 4:12], 1.0, atol=1e-5)
    np.testing.assert_allclose(seen[:, :4], 0.0, atol=1e-6)
    np.testing.assert_allclose(seen[:, 12:], 0.0, atol=1e-6)


def test_cropping_resizes_the_shorter_edge() -> None:
    pixels = np.zeros((90, 30, 3), np.uint8)
    pixels[30:60] = 255
    seen = cropped(Image.fromarray(pixels), 30).numpy().transpose(1, 2, 0) * STD + MEAN
    np.testing.assert_allclose(seen, 1.0, atol=1e-5)


@torch.no_grad()
def test_quality_and_diversity_from_clip(tmp_path: Path, images: list[Image.Image]) -> None:
    folder = tiny_clip_folder(tmp_path)
    model, processor = CLIPModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(
        text=["Good photo.", "Bad photo."], images=images, padding=True, return_tensors="pt"
    )
    expected = model(**inputs).logits_per_image.softmax(dim=-1)[:, 0]
    scores = build_scorer(f"clip_iqa:{folder}", batch_size=2).score(images, PROMPTS)
    np.testing.assert_allclose(scores["clip_iqa"], expected.numpy(), atol=1e-5)

    x = model(**inputs).image_embeds
    scorer = build_scorer(f"diversity:{folder}")
    with pytest.raises(ConfigError, match="'seven' has a single image"):
        scorer.score(images, PROMPTS)
    scores = scorer.score(images, ["b", "a", "b", "a", "b"])["diversity"]
    first = 1 - (x[0] @ x[2] + x[0] @ x[4]) / 2
    assert scores[0] == pytest.approx(first.item(), abs=1e-5)
    assert scores[1] == scores[3] == pytest.approx(1 - (x[1] @ x[3]).item(), abs=1e-5)
    assert scorer.score(images[:1] * 2, ["a", "a"])["diversity"] == pytest.approx(0, abs=1e-6)


def test_the_aesthetic_head_and_clip_lie_in_one_folder(
    tmp_path: Path, images: list[Image.Image]
) -> None:
    folder = tiny_clip_folder(tmp_path)
    head = {"layers.0.weight": torch.ones(1, 12), "layers.0.bias": torch.tensor([5.0])}
    torch.save(head, folder / "sac+logos+ava1-l14-linearMSE.pth")
    scores = build_scorer(f"aesthetic:{folder}").score(images, PROMPTS)["aesthetic"]
    assert scores.shape == (5,) and np.abs(scores - 5).max() < 12**0.5
