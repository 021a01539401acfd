"""Prompts as the states of CLIP's text encoders, cut, in chunks, or of an earlier layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import BatchEncoding

from fastpo.errors import ConfigError, ModelError
from fastpo.models.encoders import Encoders


class ClipEncoders(Encoders):
    """SD1.5's encoders: the last layer's states."""

    penultimate: ClassVar[bool] = False

    def prompt_conditions(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encodes prompts as the pipeline's `encode_prompt` does the positive prompt.

        A prompt in chunks has the states of all of them behind one another, as in A1111 and
        ComfyUI, and the first one's projection.
        """
        states: list[Tensor] = []
        conditions: dict[str, Tensor] = {}
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            tokens = self._tokens(tokenizer, prompts).to(self.device)
            # A configuration from a hub need not have the key.
            masked = getattr(encoder.config, "use_attention_mask", False)
            output = encoder(
                tokens["input_ids"],
                attention_mask=tokens["attention_mask"] if masked else None,
                output_hidden_states=self.penultimate or self.clip_skip > 0,
            )
            found = self._states(encoder, output)
            states.append(found.unflatten(0, (-1, self.chunks)).flatten(1, 2))
            if output[0].ndim == 2:
                conditions["pooled"] = output[0][:: self.chunks]
        return {"prompt_embeds": torch.cat(states, dim=-1), **conditions}

    def count_cut(self, prompts: Sequence[str]) -> int:
        """As `Encoders.count_cut`, by the tokenizer that needs the most tokens."""
        longest = [0] * len(prompts)
        for tokenizer in self.tokenizers:
            room = self.chunks * (tokenizer.model_max_length - 2)
            ids = _plain_tokens(tokenizer, prompts)
            longest = [max(n, len(own) - room) for n, own in zip(longest, ids, strict=True)]
        return sum(n > 0 for n in longest)

    def check_layers(self) -> None:
        """Refuses to leave out more layers than an encoder has.

        Raises:
            ConfigError: `prepare.clip_skip` is too large.
        """
        for encoder in self.text_encoders:
            most = encoder.config.num_hidden_layers - self.penultimate
            if self.clip_skip > most:
                raise ConfigError(
                    f"prepare.clip_skip: a text encoder of this model has {most} layers to leave "
                    f"out, got {self.clip_skip}"
                )

    def _states(self, encoder: Any, output: Any) -> Tensor:
        """The states that the denoiser is told, `(N chunks, L, D)`."""
        if self.penultimate:
            return output.hidden_states[-(self.clip_skip + 2)]
        if not self.clip_skip:
            return output[0]
        # diffusers' pipeline looks for it where transformers had it before its version 5.6.
        inner = encoder.text_model if hasattr(encoder, "text_model") else encoder
        return inner.final_layer_norm(output.hidden_states[-(self.clip_skip + 1)])

    def _tokens(self, tokenizer: Any, prompts: Sequence[str]) -> BatchEncoding:
        """Ids and mask, each `(N chunks, L)`, a prompt's chunks behind one another."""
        if self.chunks == 1:
            return tokenizer(
                list(prompts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
        room = tokenizer.model_max_length - 2
        first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
        rows = [
            [first, *own[start : start + room], last]
            for own in _plain_tokens(tokenizer, prompts)
            for start in range(0, self.chunks * room, room)
        ]
        return tokenizer.pad(
            {"input_ids": rows}, padding="max_length", max_length=room + 2, return_tensors="pt"
        )


def _plain_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """All tokens of each prompt, none added and none cut."""
    return tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]


class PenultimateEncoders(ClipEncoders):
    """SDXL's: the last but one layer's states of both encoders, and the second one's projection.

    Where the VAE's configuration has `latents_mean` and `latents_std`, latents are normalized by
    channel, `(z - mean) / std`: the inverse of what SDXL's pipelines do before they decode.
    """

    penultimate = True

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `Encoders.encode_images`, of the normalized latents."""
        mean, logvar = super().encode_images(pixels)
        normalization = latent_normalization(self.vae.config)
        if normalization is None:
            return mean, logvar
        center, spread = (
            torch.tensor(values, device=mean.device).view(-1, 1, 1) for values in normalization
        )
        return (mean - center) / spread, logvar - 2.0 * spread.log()


def latent_normalization(config: Mapping[str, Any]) -> tuple[list[float], list[float]] | None:
    """Returns a VAE's mean and standard deviation of each latent channel.

    None where one is missing: SDXL's pipelines then leave latents as they are.

    Raises:
        ModelError: They are not finite numbers for each channel, or a deviation is not positive.
    """
    center, spread = config.get("latents_mean"), config.get("latents_std")
    if center is None or spread is None:
        return None
    for numbers in (center, spread):
        if (
            not isinstance(numbers, list | tuple)
            or len(numbers) != config.get("latent_channels", 4)
            or not all(isinstance(x, int | float) and abs(x) < 1e6 for x in numbers)
        ):
            raise ModelError(
                "the VAE's latents_mean and latents_std must be a number for each channel, got "
                f"{ascii(numbers)[:80]}"
            )
    if min(spread) <= 0:
        raise ModelError(f"the VAE's latents_std must be positive, got {ascii(spread)[:80]}")
    return [float(x) for x in center], [float(x) for x in spread]
