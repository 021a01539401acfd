"""Small stand-ins for pipelines whose prompts are read by a language model, built offline.

Z-Image, Qwen-Image and FLUX.2 with the real ones' folder layout, classes and configuration keys and
random weights, a few ten thousand of them. Their tokenizers know single bytes and the chat's marks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastpo.system.files import write_json
from fastpo.system.json_text import read_json
from fastpo.testing.flow import seeded, tiny_vae
from fastpo.testing.pipelines import save_pipeline

_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_IMAGE_MARKS = (*_MARKS, *_VISION)
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


def tiny_z_image_folder(path: Path, *, seed: int = 0, **scheduler: Any) -> Path:
    """Writes a pipeline of Z-Image's kind: images of multiples of 4 px, texts of 512 tokens.

    Args:
        path: Folder to create; an existing one is overwritten file by file.
        seed: Seed of the random weights; the caller's random state is left alone.
        scheduler: Further settings of its scheduler.

    Returns:
        `path`.
    """
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
    from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline

    def make() -> Any:
        tokenizer = chat_tokenizer()
        return ZImagePipeline(
            scheduler=_scheduler({"shift": 3.0}, scheduler),
            vae=tiny_vae(scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=_qwen3(tokenizer, width=16, layers=3),
            tokenizer=tokenizer,
            transformer=ZImageTransformer2DModel(
                in_channels=16,
                dim=32,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=16,
                axes_dims=[4, 6, 6],
            ),
        )

    return _written(make, path, seed)


def tiny_qwen_image_folder(path: Path, *, seed: int = 0, **scheduler: Any) -> Path:
    """Writes a pipeline of Qwen-Image's kind: a VAE of five dimensions, normalized by channel.

    Args and return value as in `tiny_z_image_folder`; images are of multiples of 4 px.
    """
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline

    def make() -> Any:
        tokenizer = chat_tokenizer()
        return QwenImagePipeline(
            scheduler=_scheduler(QWEN_SHIFT, scheduler),
            vae=_qwen_vae(),
            text_encoder=_qwen_vl(tokenizer, width=16),
            tokenizer=tokenizer,
            transformer=_qwen_transformer(),
        )

    return _written(make, path, seed)


def tiny_qwen_image_edit_folder(
    path: Path, *, seed: int = 0, plus: bool = False, zero_cond_t: bool = False
) -> Path:
    """Writes a pipeline of Qwen-Image-Edit's kind; its language model sees images.

    Args:
        path: Folder to create; an existing one is overwritten file by file.
        seed: Seed of the random weights.
        plus: As Edit-Plus (2509 and later).
        zero_cond_t: As of 2511, whose transformer is told that sources have no noise.

    Returns:
        `path`.
    """
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import QwenImageEditPipeline
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
        QwenImageEditPlusPipeline,
    )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    kind: Any = QwenImageEditPlusPipeline if plus else QwenImageEditPipeline
    tokenizer = chat_tokenizer(_IMAGE_MARKS)

    def make() -> Any:
        return kind(
            scheduler=_scheduler(QWEN_SHIFT, {}),
            vae=_qwen_vae(),
            text_encoder=_qwen_vl(tokenizer, width=16),
            tokenizer=tokenizer,
            processor=None,
            transformer=_qwen_transformer(zero_cond_t=zero_cond_t),
        )

    _written(make, path, seed)
    # transformers writes a processor only where it has torchvision, for the part for videos.
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    for part in (images, tokenizer):
        part.save_pretrained(path / "processor")
    index = path / "model_index.json"
    write_json(
        index,
        read_json(index, most_bytes=1 << 20) | {"processor": ["transformers", "Qwen2VLProcessor"]},
    )
    return path


def tiny_flux2_klein_folder(
    path: Path, *, seed: int = 0, is_distilled: bool = False, **scheduler: Any
) -> Path:
    """Writes a pipeline of FLUX.2-klein's kind: latents in patches, normalized by statistics.

    Args and return value as in `tiny_z_image_folder`; images are of multiples of 4 px, texts of 512
    tokens. `is_distilled` is written into `model_index.json`.
    """
    from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline

    def make() -> Any:
        tokenizer = chat_tokenizer()
        return Flux2KleinPipeline(
            scheduler=_scheduler(FLUX2_SHIFT, scheduler),
            vae=_flux2_vae(),
            text_encoder=_qwen3(tokenizer, width=8, layers=27),
            tokenizer=tokenizer,
            transformer=_flux2_transformer(text_width=24, guidance_embeds=False),
            is_distilled=is_distilled,
        )

    return _written(make, path, seed)


def tiny_flux2_dev_folder(path: Path, *, seed: int = 0, **scheduler: Any) -> Path:
    """Writes a pipeline of FLUX.2-dev's kind: guidance is told, Mistral reads the prompts.

    Args and return value as in `tiny_flux2_klein_folder`. The real one has a processor, with images
    in chats, where this one has a tokenizer alone.
    """
    from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    def make() -> Any:
        tokenizer = chat_tokenizer()
        text = _language_config(tokenizer, width=8, layers=30)
        vision = {
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 8,
            "image_size": 28,
            "patch_size": 14,
        }
        config = Mistral3Config(
            text_config={"model_type": "mistral", **text},
            vision_config={"model_type": "pixtral", **vision},
        )
        return Flux2Pipeline(
            scheduler=_scheduler(FLUX2_SHIFT, scheduler),
            vae=_flux2_vae(),
            text_encoder=Mistral3ForConditionalGeneration(config),
            tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
            transformer=_flux2_transformer(text_width=24, guidance_embeds=True),
        )

    return _written(make, path, seed)


QWEN_SHIFT: Mapping[str, Any] = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
}
FLUX2_SHIFT: Mapping[str, Any] = {"use_dynamic_shifting": True, "shift": 3.0}


def chat_tokenizer(marks: tuple[str, ...] = _MARKS) -> Any:
    """Qwen's tokenizer without merges: each byte is a token; texts are put into a chat.

    Args:
        marks: The tokens that mark a chat's parts.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    names = [*sorted(ByteLevel.alphabet()), *marks]
    tokenizer = Qwen2Tokenizer(
        vocab={name: i for i, name in enumerate(names)},
        merges=[],
        extra_special_tokens=list(marks),
        model_max_length=1 << 14,
    )
    tokenizer.chat_template = _CHAT
    return tokenizer


def _written(make: Callable[[], Any], path: Path, seed: int) -> Path:
    with seeded(seed):
        pipeline = make()
    return save_pipeline(pipeline, path)


def _scheduler(usual: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    return FlowMatchEulerDiscreteScheduler(**{**usual, **own})


def _qwen_vae() -> Any:
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
    )


def _qwen_transformer(**options: Any) -> Any:
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        **options,
    )


def _flux2_vae() -> Any:
    """With statistics of the patches' channels that are not those of a fresh layer."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
    )
    statistics: Any = vae.bn
    channels = torch.arange(128.0)
    statistics.running_mean.copy_(torch.sin(channels))
    statistics.running_var.copy_(1.0 + 0.5 * torch.cos(channels))
    return vae


def _flux2_transformer(*, text_width: int, guidance_embeds: bool) -> Any:
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=text_width,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def _language_config(tokenizer: Any, *, width: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _qwen3(tokenizer: Any, *, width: int, layers: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_language_config(tokenizer, width=width, layers=layers)))


def _qwen_vl(tokenizer: Any, *, width: int) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        **_language_config(tokenizer, width=width, layers=2),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
        "fullatt_block_indexes": [0],
    }
    known = set(tokenizer.all_special_tokens)
    ids = {
        f"{mark.strip('<|>').removesuffix('_pad')}_token_id": tokenizer.convert_tokens_to_ids(mark)
        for mark in _VISION
        if mark in known
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return Qwen2_5_VLForConditionalGeneration(config)
