"""The page's lines for another project, as they stand there, on kernels that are not ours."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

KERNELS = """
import triton
import triton.language as tl


@triton.jit
def softmax_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + at, mask=at < n, other=float("-inf"))
    e = tl.exp(x - tl.max(x))
    tl.store(y_ptr + row * n + at, e / tl.sum(e), mask=at < n)


@triton.jit
def layer_norm_kernel(x_ptr, w_ptr, b_ptr, y_ptr, n, eps, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    mask = at < n
    x = tl.load(x_ptr + row * n + at, mask=mask, other=0.0).to(tl.float32)
    centered = tl.where(mask, x - tl.sum(x) / n, 0.0)
    y = centered * tl.rsqrt(tl.sum(centered * centered) / n + eps)
    w, b = tl.load(w_ptr + at, mask=mask), tl.load(b_ptr + at, mask=mask)
    tl.store(y_ptr + row * n + at, y * w + b, mask=mask)


@triton.jit
def running_sum_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + at, mask=at < n, other=0.0)
    tl.store(y_ptr + row * n + at, tl.cumsum(x, 0), mask=at < n)


@triton.jit
def transpose_kernel(x_ptr, y_ptr, rows, columns, SIZE: tl.constexpr):
    r = tl.program_id(0) * SIZE + tl.arange(0, SIZE)[:, None]
    c = tl.program_id(1) * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + r * columns + c, mask=(r < rows) & (c < columns))
    tl.store(y_ptr + c * rows + r, x, mask=(c < columns) & (r < rows))


@triton.jit
def sort_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.sort(tl.load(x_ptr + at)))


@triton.jit
def silu_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)
    tl.store(y_ptr + at, x * tl.sigmoid(x.to(tl.float32)).to(x.dtype), mask=at < n)


@triton.jit
def product_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x))
"""
MORE = """
import sys

import my_kernels as kernels
import ptx_machine
import pytest

for dtype in (torch.float32, torch.bfloat16):
    x, w, b = (torch.randn(*shape).to(dtype) for shape in ((5, 300), (300,), (300,)))
    y = torch.empty_like(x)
    kernels.layer_norm_kernel[(5,)](x, w, b, y, 300, 1e-5, BLOCK=512)
    exact = torch.layer_norm(x.double(), (300,), w.double(), b.double(), 1e-5)
    torch.testing.assert_close(y, exact.to(dtype))
    kernels.silu_kernel[(2,)](x, y, 1500, BLOCK=1024)
    gate = torch.sigmoid(x.float()).to(dtype)
    torch.testing.assert_close(y, x * gate)

x, y = torch.randn(5, 300), torch.empty(5, 300)
kernels.running_sum_kernel[(5,)](x, y, 300, BLOCK=512)
torch.testing.assert_close(y, x.cumsum(1), rtol=1e-5, atol=1e-5)
turned = torch.empty(300, 5)
kernels.transpose_kernel[(1, 10)](x, turned, 5, 300, SIZE=32)
assert torch.equal(turned, x.T)
x, y = torch.randn(256), torch.empty(256)
kernels.sort_kernel[(1,)](x, y, BLOCK=256)
assert torch.equal(y, x.sort().values)
assert hook.machine.counts["sort_kernel"].by_kind()["exchange"] > 0

with pytest.raises(RuntimeError, match="outside a tensor"):  # 320 numbers of the last row's 300
    softmax_kernel[(5,)](torch.randn(5, 300), torch.empty(5, 300), 320, BLOCK=512)
assert isinstance(hook.error, ptx_machine.OutOfBounds)
with pytest.raises(RuntimeError, match="nothing was stored"):
    softmax_kernel[(5,)](torch.empty(5, 300), torch.empty(5, 300), 300, BLOCK=512)
with pytest.raises(RuntimeError, match="mma"):  # not known: named
    kernels.product_kernel[(1,)](torch.randn(32, 32), torch.empty(32, 32), SIZE=32)
assert isinstance(hook.error, ptx_machine.UnknownInstruction)
assert not [name for name in sys.modules if name.startswith("fastpo")]
print("all ran")
"""


@pytest.mark.slow
def test_the_pages_lines(tmp_path):
    page = (ROOT / "docs" / "ptx-machine.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", page[page.index("## In another project") :], re.S)
    shutil.copytree(ROOT / "tests" / "ptx_machine", tmp_path / "ptx_machine")
    for name in ("fake_gpu.py", "fake_cuda.c"):
        shutil.copy(ROOT / "benchmarks" / name, tmp_path)
    (tmp_path / "my_kernels.py").write_text(KERNELS)
    (tmp_path / "try_it.py").write_text(lines + MORE)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "try_it.py")]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and "all ran" in done.stdout, done.stdout + done.stderr
