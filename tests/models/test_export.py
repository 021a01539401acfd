"""Exports: equal weights give equal bytes, and wrong bytes are found."""

import hashlib
import sys
from pathlib import Path

import torch

from fastpo.config import LoraConfig
from fastpo.models.denoisers import add_lora
from fastpo.models.export import EXPORT_MANIFEST, export_damage, export_policy
from fastpo.models.folder import ModelFolder


def export_adapters(pipeline, out):
    model = ModelFolder(Path(pipeline))
    torch.manual_seed(0)
    denoiser = model.family.load_denoiser(model)
    add_lora(model.family, denoiser, LoraConfig())
    export_policy(model.family, denoiser, Path(out), "lora")


ANOTHER = "import sys; from tests.models.test_export import export_adapters as e; e(*sys.argv[1:])"


def test_lora_files_are_equal_whatever_the_order_of_sets(fastpo, tiny_pipelines, tmp_path):
    """peft keeps layers' names in sets, and safetensors writes metadata in random order."""
    another = {"PYTHONHASHSEED": str(1 + sys.flags.hash_randomization)}
    digests = set()
    for name in ("here", "in another process"):
        out = tmp_path / name
        if name == "here":
            export_adapters(tiny_pipelines["sd15"], out)
        else:
            fastpo(tiny_pipelines["sd15"], out, launcher=("-c", ANOTHER), env=another)
        files = [out / EXPORT_MANIFEST, out / "pytorch_lora_weights.safetensors"]
        digests.add(tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in files))
        assert export_damage(out) is None
    assert len(digests) == 1
    weights = out / "pytorch_lora_weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4] + b"\x01\x02\x03\x04")
    assert "pytorch_lora_weights.safetensors is damaged" in str(export_damage(out))
    (out / EXPORT_MANIFEST).unlink()
    assert export_damage(out) is None  # an earlier version's, which says nothing of its content
    weights.write_bytes(b"")
    assert "cannot be read" in str(export_damage(out))
    weights.unlink()
    assert "holds no weights" in str(export_damage(out))
