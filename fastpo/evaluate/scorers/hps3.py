"""HPSv3 (arXiv 2508.03789) from its released checkpoint, without its package.

`HPSv3.safetensors` holds a tuned Qwen2-VL-7B under the names that transformers gave it before
version 4.52, one token more than that model's tokenizer knows, and a head of three linear layers
which reads the state at that token. Configuration and tokenizer are those of the model it began as.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastpo.errors import ModelError
from fastpo.evaluate.scorers.base import Scores, WeightedScorer
from fastpo.evaluate.scorers.loading import fill, find_file, load, load_tokenizer, read_weights

HUB, FILE, BASE = "MizzenAI/HPSv3", "HPSv3.safetensors", "Qwen/Qwen2-VL-7B-Instruct"
REWARD, IMAGE = "<|Reward|>", "<|image_pad|>"
PIXELS = 256 * 28 * 28
"""Of an image as the model sees it: resized to about as many, in sides that 28 divides."""
HEAD = ("0", "3", "5")
"""Its linear layers, as numbered in the checkpoint; the others are ReLU and dropout."""
BEFORE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
)
# What the released model was tuned on, word for word: MizzenAI/HPSv3, MIT license.
INSTRUCTION = (
    "\n"
    "You are tasked with evaluating a generated image based on Visual Quality and Text "
    "Alignment and give a overall score to estimate the human preference. Please provide "
    "a rating from 0 to 10, with 0 being the worst and 10 being the best. \n"
    "\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions "
    "should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or "
    "logical errors, such as abnormal body structures or nonsensical environmental "
    "setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should "
    "be clear and easy to interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, "
    "lighting, and other visual elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including "
    "the color scheme, composition, atmosphere, depth of field, and the overall creative "
    "appeal. The scene should convey a sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such "
    "as political, violent, or adult material. If such content is present, the image "
    "quality and satisfaction score should be the lowest possible. \n"
    "\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following "
    "sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., "
    "person, animal, object) align with the textual description. The subject should "
    "match the description in terms of number, appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic "
    "style, evaluate how well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and "
    "surrounding elements in the image logically fit the scenario described in the "
    "prompt. The environment should support and enhance the subject without "
    "contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt "
    "(e.g., colors, clothing, accessories, expressions, actions) are faithfully "
    "represented in the image. Minor deviations may be acceptable, but critical "
    "attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the "
    "prompt are captured in the image. The generated content should not introduce "
    "elements that conflict with or distort the original description.\n"
    "Textual prompt - {text_prompt}\n"
    "\n"
    "\n"
)
RATING = "\nPlease provide the overall ratings of this image: "
_NAMES = (
    ("model.visual.", "visual."),
    ("model.language_model.", "language_model."),
    ("model.", "language_model."),
)


class Hps3Scorer(WeightedScorer):
    """HPSv3: the mean of a normal distribution of people's scores; higher is better.

    As released, with two differences that change no result: images of a batch are padded behind
    their last token, and what the released code puts behind the reward's token, which cannot see
    it, is left away. The head is computed in float64.

    Args:
        path: `HPSv3.safetensors`, a folder that holds it, or a hub id. `config.json` and the
            tokenizer are those of the folder if they lie there, else Qwen2-VL-7B-Instruct's.
        options: `device`, `batch_size`, `precision`: see `WeightedScorer`. The authors run it in
            bf16, in which it takes 16 GB, against 33 GB in fp32.

    Raises:
        ModelError: The checkpoint, the configuration or the tokenizer is not available or not of
            this format.
    """

    name = "hpsv3"

    def __init__(self, path: str | None = None, **options: Any) -> None:
        from transformers import Qwen2VLImageProcessorPil

        super().__init__(**options)
        file = find_file(self.name, path or HUB, FILE)
        state = read_weights(self.name, file)
        head = {n: state.pop(n) for n in list(state) if n.startswith("rm_head.")}
        words = len(state.get("model.embed_tokens.weight", ()))
        self.tokenizer = load_tokenizer(self.name, file.parent, BASE, most=words)
        self.tokenizer.add_tokens([REWARD], special_tokens=True)
        if len(self.tokenizer) != words:
            raise ModelError(
                f"scorer hpsv3: {file} has {words} tokens, its tokenizer {len(self.tokenizer)} "
                f"with {REWARD}; {FILE} and the tokenizer of {BASE} were expected"
            )
        model = _model(state, file, words)
        self.head = _head(head, model.config.text_config.hidden_size, file)
        self.model = model.to(self.dtype).eval().to(self.device)
        size: Any = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
        self.images = Qwen2VLImageProcessorPil(size=size)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Scores:
        """Returns `{"hpsv3": (N,)}`."""
        return {self.name: self.batched(self._reward, images, prompts)}

    def _reward(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        seen = self.images(images=[image.convert("RGB") for image in images], return_tensors="pt")
        grid = seen["image_grid_thw"]
        tokens = (grid.prod(dim=1) // self.images.merge_size**2).tolist()
        texts = [text_of(prompt, count) for prompt, count in zip(prompts, tokens, strict=True)]
        read = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        ids, kept = (read[name].to(self.device) for name in ("input_ids", "attention_mask"))
        pixels = seen["pixel_values"].to(self.device, self.dtype)
        features = self.model.get_image_features(pixels, grid.to(self.device)).pooler_output
        embeds = self.model.language_model.embed_tokens(ids)
        places = (ids == self.tokenizer.convert_tokens_to_ids(IMAGE))[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(places, torch.cat(list(features)).to(embeds))
        states = self.model.language_model(
            inputs_embeds=embeds, attention_mask=kept, use_cache=False
        ).last_hidden_state
        rows = torch.arange(len(ids), device=self.device)
        return _apply(self.head, states[rows, kept.sum(dim=1) - 1])


def text_of(prompt: str, image_tokens: int) -> str:
    """What the model reads of one image and its prompt, up to the token that is rated."""
    plain = prompt.replace("<|", "< |")  # a prompt shall hold none of the tokenizer's marks
    images = f"{BEFORE}{IMAGE * image_tokens}<|vision_end|>"
    return images + INSTRUCTION.format(text_prompt=plain) + RATING + REWARD


def _model(state: dict[str, Tensor], file: Path, words: int) -> Any:
    """The network without its head for words, filled from the checkpoint."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, Qwen2VLModel

    beside = (file.parent / "config.json").is_file()
    advice = (
        f"It is the configuration that is missing, not the weights. Fetch it where there is a "
        f"network (`hf download {BASE} config.json --local-dir {file.parent}`), beside the weights"
    )
    source = str(file.parent) if beside else BASE
    config = load("hpsv3", source, AutoConfig.from_pretrained, advice)
    if config.model_type != "qwen2_vl":
        raise ModelError(f"scorer hpsv3: {source} is a {config.model_type}, expected qwen2_vl")
    config.text_config.vocab_size = words
    named = {_name(name): tensor for name, tensor in state.items() if name != "lm_head.weight"}
    with init_empty_weights(include_buffers=False):
        model = Qwen2VLModel(config)
    return fill(model, named, file, "scorer hpsv3", f"{FILE} was expected")


def _name(name: str) -> str:
    """The name of a tensor in transformers of today."""
    for before, now in _NAMES:
        if name.startswith(before):
            return now + name.removeprefix(before)
    return name


def _head(state: dict[str, Tensor], width: int, file: Path) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of the head's linear layers."""
    wanted = {f"rm_head.{layer}.{kind}" for layer in HEAD for kind in ("weight", "bias")}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    layers = [(state.get(f"rm_head.{n}.weight"), state.get(f"rm_head.{n}.bias")) for n in HEAD]
    found = [(weight, bias) for weight, bias in layers if weight is not None and bias is not None]
    takes = [width, *(len(weight) for weight, _ in found)]
    fits = all(
        weight.ndim == 2 and weight.shape[1] == before and len(bias) == len(weight)
        for (weight, bias), before in zip(found, takes, strict=False)
    )
    if set(state) != wanted or not fits:
        raise ModelError(
            f"scorer hpsv3: the head of {file} must be linear layers {', '.join(HEAD)} that lead "
            f"from {width} features to mean and deviation, it has {shapes}"
        )
    return found


def _apply(layers: list[tuple[Tensor, Tensor]], states: Tensor) -> Tensor:
    """The mean, `(N,)` float64, of states `(N, D)`."""
    x = states.double()
    for number, (weight, bias) in enumerate(layers):
        x = torch.nn.functional.linear(x.relu() if number else x, weight.to(x), bias.to(x))
    return x[:, 0]
