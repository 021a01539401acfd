#!/usr/bin/env bash
# On a CPU with AVX-512, dequantize_4bit takes the wrong scales where a row is no whole number of blocks.
#
# Versions: bitsandbytes 0.50.2, torch 2.13.0, Python 3.11, a processor with AVX-512.
#
# What surprises: quantize_4bit counts its blocks through the whole tensor, so that blocks cross the
# ends of rows whose length is no multiple of the block size (64, or 128). With AVX-512
# dequantize_4bit reads rows as if each began a block: codes are right, scales are those of other
# blocks. Nothing is said; the weights that come back are off by a quarter of their norm instead of
# the 9 % that four bits cost. The same codes decoded by hand, or quantized as one row, are right.
#
# Seen (relative error of normal weights, by dequantize_4bit and decoded by hand):
#   bitsandbytes 0.50.2 torch 2.13.0+cpu AVX512
#   (40, 64)   blocks of 64   0.094 by hand 0.094
#   (40, 96)   blocks of 64   0.278 by hand 0.092
#   (40, 64)   blocks of 128  0.154 by hand 0.094
#   (128, 96)  blocks of 64   0.222 by hand 0.092
#   (40, 96) as one row, blocks of 64: 0.092
#
# Why it matters: QLoRA trains adapters on what dequantize_4bit returns. Layers of tiny test models,
# and of models with widths such as 96 or 160, train on another base on one CPU than on another one
# and than on a GPU.
#
# What FastPO does: a layer's weight is quantized and decoded as one row, whatever its shape.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
python=$work/venv/bin/python
install() { "$python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install bitsandbytes==0.50.2

"$python" - <<'PYTHON'
import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

capability = torch.backends.cpu.get_cpu_capability()
print("bitsandbytes", bitsandbytes.__version__, "torch", torch.__version__, capability)
if capability != "AVX512":
    raise SystemExit("needs a processor with AVX-512: nothing was looked at here")


def errors(shape, block):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    codes, state = quantize_4bit(weight, blocksize=block, quant_type="nf4", compress_statistics=False)
    found = dequantize_4bit(codes, state)
    nibbles = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten().long()
    scales = state.absmax.repeat_interleave(block)[: weight.numel()]
    by_hand = (state.code[nibbles] * scales).view(shape)
    return [float((each - weight).norm() / weight.norm()) for each in (found, by_hand)]


wrong = []
for shape, block in (((40, 64), 64), ((40, 96), 64), ((40, 64), 128), ((128, 96), 64)):
    found, by_hand = errors(shape, block)
    print(f"{str(shape):10s} blocks of {block:<4d} {found:.3f} by hand {by_hand:.3f}")
    if by_hand > 0.12:
        raise SystemExit("CHANGED: the codes themselves are others")
    wrong.append(found > 1.2 * by_hand)
(one_row, _) = errors((40 * 96,), 64)
print(f"(40, 96) as one row, blocks of 64: {one_row:.3f}")
if wrong != [False, True, True, True] or one_row > 0.12:
    raise SystemExit("CHANGED: rows of other lengths are decoded right, or one row is not")
print("still so")
PYTHON
