"""Families whose prompts a language model reads: chats, padding, and what is cut of long ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastpo.config.sections import PrepareConfig
from fastpo.errors import ConfigError, ModelError
from fastpo.models.encoders import Encoders
from fastpo.models.flow import FlowFamily
from fastpo.models.folder import ModelFolder, loading, read_json
from fastpo.models.weights import load_part
from fastpo.precision import DTYPES


@dataclass(frozen=True)
class LanguageEncoders(Encoders):
    """A VAE and a language model with its tokenizer.

    Attributes:
        length: Tokens of a prompt, its chat among them where the pipeline counts that.
    """

    length: int = 512

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self.tokenizers[0]

    def pipeline_of(self, kind: Any) -> Any:
        """Returns a pipeline of a class with tokenizer and text encoder alone, to encode with."""
        return kind(None, None, self.text_encoders[0], self.tokenizer, None)


class LanguageFamily(FlowFamily):
    """A flow-matching transformer beside one language model.

    Attributes:
        encoders_class: Makes latents of images and conditions of prompts.
        text_class: The transformers class of the language model.
        text_length: Tokens of a prompt in the pipeline.
        most_text: The longest that the pipeline takes, or None.
        text_states: How many layers' states the transformer reads side by side.
        text_layer: The last layer that is read, or None: it is counted from the end.
        text_width: The key of the transformer's configuration for the width of a token's states.
    """

    encoder_parts = ("text_encoder", "tokenizer")
    encoders_class: ClassVar[type[LanguageEncoders]]
    text_class: ClassVar[Any]
    text_length: ClassVar[int] = 512
    most_text: ClassVar[int | None] = None
    text_states: ClassVar[int] = 1
    text_layer: ClassVar[int | None] = None
    text_width: ClassVar[str] = "joint_attention_dim"

    def check(self, folder: ModelFolder) -> None:
        """As `FlowFamily.check`; the language model must be the transformer's."""
        super().check(folder)
        if folder.checkpoint is not None:
            raise ModelError(
                f"model.path: {folder.checkpoint}: FastPO reads {self.name} from a diffusers "
                "folder or a hub id, not from one file"
            )
        path = folder.component("text_encoder") / "config.json"
        config = read_json(path)
        kind, wanted = config.get("model_type"), self.text_class.config_class.model_type
        if kind is not None and kind != wanted:
            raise ModelError(
                f"{path}: the text encoder of {self.name} is a {self.text_class.__name__}, of "
                f"model_type {wanted!r}; got {ascii(kind)[:80]}"
            )
        inner: Any = config.get("text_config") or config
        width, layers = inner.get("hidden_size"), inner.get("num_hidden_layers")
        if not isinstance(width, int) or not isinstance(layers, int):
            raise ModelError(f"{path} names no hidden_size and num_hidden_layers")
        reads = self.denoiser_config(folder).get(self.text_width)
        if self.text_states * width != reads:
            raise ModelError(
                f"{path}: this text encoder gives {self.text_states} x {width} numbers a token, "
                f"the transformer reads {ascii(reads)[:20]}: they are of different models"
            )
        if layers < (self.text_layer or 0):
            raise ModelError(
                f"{path}: {self.name} reads layer {self.text_layer} of its text encoder, which has "
                f"{layers}"
            )

    def load_encoders(
        self, folder: ModelFolder, config: PrepareConfig, device: torch.device
    ) -> Encoders:
        """Loads the VAE, the language model and its tokenizer."""
        self.refuse_clip_options(config)
        length = config.text_length or self.text_length
        if self.most_text is not None and length > self.most_text:
            raise ConfigError(
                f"prepare.text_length: {self.name} reads at most {self.most_text} tokens, got "
                f"{length}"
            )
        tokenizer = self._load_tokenizer(folder)
        part = folder.component("text_encoder")
        what = f"{part} could not be loaded"
        dtype = DTYPES[config.text_precision]
        text = load_part(self.text_class, folder, "text_encoder", what=what, dtype=dtype)
        text.to(device).eval().requires_grad_(False)
        vae = self.load_vae(folder, config, device)
        parts = (tokenizer,), (text,)
        options = self.encoder_options(folder)
        return self.encoders_class(vae, *parts, device, length=length, **options)

    def encoder_options(self, folder: ModelFolder) -> dict[str, Any]:
        """Returns what else the family's encoders are made of, loaded, by its attribute's name."""
        return {}

    def _load_tokenizer(self, folder: ModelFolder) -> Any:
        """Of a processor's folder, too, the tokenizer is all that texts need."""
        from transformers import AutoTokenizer

        part = folder.component("tokenizer")
        with loading(f"{part} could not be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(part)
        with loading(
            f"{part}: this tokenizer's chat template (chat_template.jinja, or chat_template of "
            f"tokenizer_config.json), into which {self.name} puts prompts, is missing or broken"
        ):
            self.in_chats(tokenizer, ["a prompt"])
        return tokenizer

    def in_chats(self, tokenizer: Any, prompts: Sequence[str]) -> Sequence[str]:
        """Returns prompts in the chat that the pipeline puts them into by the tokenizer's template.

        A family that has none returns them as they are.
        """
        return prompts

    def prompt_arguments(
        self, pipeline: Any, prompts: Sequence[str], config: PrepareConfig
    ) -> dict[str, Any]:
        """As `ModelFamily.prompt_arguments`, with the length of the text."""
        length = config.text_length or self.text_length
        return {"prompt": list(prompts), "max_sequence_length": length}


def chats(tokenizer: Any, prompts: Sequence[str], *, thinking: bool) -> list[str]:
    """Puts each prompt into the model's chat as the user's message; see `enable_thinking`."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        for prompt in prompts
    ]


def padded(states: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Pads texts with zeros behind their last token.

    Args:
        states: N texts, each `(L, D)` with `L <= length`.
        length: Tokens of a padded text.

    Returns:
        `(N, length, D)`, and `(N, length)` bool, true at the texts' own tokens.
    """
    own = torch.tensor([len(text) for text in states], device=states[0].device)
    mask = torch.arange(length, device=own.device) < own[:, None]
    return torch.stack([pad(text, (0, 0, 0, length - len(text))) for text in states]), mask


def lengths(mask: Tensor) -> list[int]:
    """Returns the lengths of padded texts; waits for the device."""
    return mask.sum(dim=1).tolist()
