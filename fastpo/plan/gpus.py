"""Peak rates and memory of GPUs, from their makers' data sheets."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from fastpo.config import Precision
from fastpo.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """What a data sheet states, without sparsity; matrix products accumulate in float32.

    Attributes:
        name: Full name.
        bf16: TFLOP/s of bf16 and fp16 matrix products.
        tf32: TFLOP/s of TF32 ones, in which torch runs float32 convolutions unless told otherwise.
        fp32: TFLOP/s of float32 without matrix units.
        memory_gb: Memory in GB, 1e9 bytes.
    """

    name: str
    bf16: float
    tf32: float
    fp32: float
    memory_gb: float

    def rate(self, precision: Precision, *, convolutions: bool = False) -> float:
        """TFLOP/s of a module in a precision; `convolutions` says that they are most of it."""
        if precision != "fp32":
            return self.bf16
        return self.tf32 if convolutions else self.fp32


GPUS = {
    "a10": Gpu("NVIDIA A10", 125.0, 62.5, 31.2, 24),
    "a100": Gpu("NVIDIA A100 80GB", 312.0, 156.0, 19.5, 80),
    "a100-40gb": Gpu("NVIDIA A100 40GB", 312.0, 156.0, 19.5, 40),
    "a6000": Gpu("NVIDIA RTX A6000", 154.8, 77.4, 38.7, 48),
    "b200": Gpu("NVIDIA B200 (HGX)", 2250.0, 1125.0, 75.0, 180),
    "h100": Gpu("NVIDIA H100 SXM", 989.4, 494.7, 66.9, 80),
    "h100-pcie": Gpu("NVIDIA H100 PCIe", 756.0, 378.0, 51.2, 80),
    "h200": Gpu("NVIDIA H200 SXM", 989.4, 494.7, 66.9, 141),
    "l4": Gpu("NVIDIA L4", 121.0, 60.0, 30.3, 24),
    "l40s": Gpu("NVIDIA L40S", 362.1, 183.0, 91.6, 48),
    "mi300x": Gpu("AMD Instinct MI300X", 1307.4, 653.7, 163.4, 192),
    # GeForce: dense "FP16/BF16 Tensor TFLOPS with FP32 accumulate" of NVIDIA's whitepapers (Ampere
    # GA102, appendix A; Ada, appendix A; RTX Blackwell, appendix A): half of the rate with FP16
    # accumulate, twice the float32 rate, which TF32 has. Checked for the 3090 Ti (40, 80), 4060
    # (15.1, 30.2) and 4090 (82.6, 165.2) against hmc-tech.com/gpu and waredb.com/processor.
    "rtx3060": Gpu("NVIDIA GeForce RTX 3060 12GB", 25.5, 12.7, 12.7, 12),
    "rtx3070": Gpu("NVIDIA GeForce RTX 3070", 40.6, 20.3, 20.3, 8),
    "rtx3080": Gpu("NVIDIA GeForce RTX 3080 10GB", 59.5, 29.8, 29.8, 10),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", 71.0, 35.6, 35.6, 24),
    "rtx4060": Gpu("NVIDIA GeForce RTX 4060", 30.2, 15.1, 15.1, 8),
    "rtx4060ti": Gpu("NVIDIA GeForce RTX 4060 Ti 16GB", 44.1, 22.1, 22.1, 16),
    "rtx4070": Gpu("NVIDIA GeForce RTX 4070", 58.3, 29.1, 29.1, 12),
    "rtx4080": Gpu("NVIDIA GeForce RTX 4080", 97.5, 48.7, 48.7, 16),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6, 24),
    "rtx5070": Gpu("NVIDIA GeForce RTX 5070", 61.7, 30.9, 30.9, 12),
    "rtx5080": Gpu("NVIDIA GeForce RTX 5080", 112.6, 56.3, 56.3, 16),
    "rtx5090": Gpu("NVIDIA GeForce RTX 5090", 209.5, 104.8, 104.8, 32),
    "rtx6000ada": Gpu("NVIDIA RTX 6000 Ada", 364.2, 182.1, 91.1, 48),
}


def find_gpu(name: str) -> Gpu:
    """Returns a GPU by its short name, in any case and with or without dashes.

    Raises:
        ConfigError: It is not in the table; the text names the nearest and all that are.
    """
    plain = {key.replace("-", ""): gpu for key, gpu in GPUS.items()}
    wanted = name.lower().replace("-", "").replace(" ", "").replace("_", "")
    if wanted in plain:
        return plain[wanted]
    near = difflib.get_close_matches(wanted, plain, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"--gpu: {name!r} is unknown{hint} (known: {', '.join(GPUS)})")
