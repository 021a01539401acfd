"""Stand-ins for flow-matching models, as `fastpo.testing.pipelines` has them for UNets.

Each has the real one's folder layout, classes and configuration keys with random weights. Latents
have half of the image's sides, so that images of 16 x 24 pixels make a handful of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastpo.testing.pipelines import clip_config, clip_tokenizer, save_pipeline


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws weights from a seed inside the block; the caller's random state is left alone."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def tiny_vae(*, scaling_factor: float, shift_factor: float, channels: int = 16) -> Any:
    """An `AutoencoderKL` of the kind of SD3 and FLUX.1: no convolutions around the latents."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    down: Any = ("DownEncoderBlock2D",) * 2
    up: Any = ("UpDecoderBlock2D",) * 2
    sizes: Any = (8, 16)
    return AutoencoderKL(
        block_out_channels=sizes,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def t5_tokenizer() -> Any:
    """A T5 tokenizer of single letters and digits."""
    from transformers import T5Tokenizer

    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    vocab: Any = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def tiny_t5(tokenizer: Any, *, width: int) -> Any:
    """A T5 encoder of two layers."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def tiny_sd3_folder(path: Path, *, seed: int = 0, large: bool = False) -> Path:
    """Writes a pipeline of SD3.5's kind.

    Args:
        path: Folder to create; an existing one is overwritten file by file.
        seed: Seed of the random weights.
        large: As SD3.5 large, without the second attention of SD3.5 medium's first blocks.

    Returns:
        `path`.
    """
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
        StableDiffusion3Pipeline,
    )
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )
    from transformers import CLIPTextModelWithProjection

    with seeded(seed):
        tokenizer, letters = clip_tokenizer(), t5_tokenizer()
        dual: Any = () if large else (0,)
        transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=16,
            pooled_projection_dim=40,
            pos_embed_max_size=32,
            dual_attention_layers=dual,
            qk_norm="rms_norm",
        )
        pipeline = StableDiffusion3Pipeline(
            vae=tiny_vae(scaling_factor=1.5305, shift_factor=0.0609),
            text_encoder=CLIPTextModelWithProjection(clip_config(tokenizer, hidden_size=16)),
            text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, hidden_size=24)),
            text_encoder_3=tiny_t5(letters, width=48),
            tokenizer=tokenizer,
            tokenizer_2=clip_tokenizer(pad_token="!"),
            tokenizer_3=letters,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    return save_pipeline(pipeline, path)


def tiny_flux_folder(path: Path, *, seed: int = 0) -> Path:
    """Writes a pipeline of FLUX.1-dev's kind; args and return value as in `tiny_sd3_folder`."""
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    return _tiny_flux(FluxPipeline, path, seed)


def tiny_flux_kontext_folder(path: Path, *, seed: int = 0) -> Path:
    """Writes a pipeline of FLUX.1-Kontext's kind; args and return value as in `tiny_sd3_folder`.

    It resizes source images to about a megapixel, as the real one.
    """
    from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline

    return _tiny_flux(FluxKontextPipeline, path, seed)


def _tiny_flux(kind: Any, path: Path, seed: int) -> Path:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )
    from transformers import CLIPTextModel

    with seeded(seed):
        tokenizer, letters = clip_tokenizer(), t5_tokenizer()
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        )
        pipeline = kind(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=tiny_vae(scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=CLIPTextModel(clip_config(tokenizer, hidden_size=16)),
            tokenizer=tokenizer,
            text_encoder_2=tiny_t5(letters, width=32),
            tokenizer_2=letters,
            transformer=transformer,
        )
    return save_pipeline(pipeline, path)


def gemma_tokenizer() -> Any:
    """A Gemma tokenizer of single letters, which puts its first token before each text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizer

    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789,.:->'()\n"
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters]
    tokenizer = GemmaTokenizer(vocab={name: i for i, name in enumerate(names)})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    return tokenizer


def tiny_sana_folder(path: Path, *, seed: int = 0) -> Path:
    """Writes a pipeline of Sana's kind; args and return value as in `tiny_sd3_folder`."""
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
    from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
    from diffusers.pipelines.sana.pipeline_sana import SanaPipeline
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from transformers import Gemma2Config, Gemma2Model

    with seeded(seed):
        tokenizer = gemma_tokenizer()
        text = Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
        levels: Any = (8, 16, 32)
        vae = AutoencoderDC(
            attention_head_dim=8,
            encoder_block_out_channels=levels,
            decoder_block_out_channels=levels,
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
            scaling_factor=0.41407,
        )
        transformer = SanaTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=8,
        )
        scheduler: Any = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        pipeline = SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=Gemma2Model(text),
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
        )
    return save_pipeline(pipeline, path)
