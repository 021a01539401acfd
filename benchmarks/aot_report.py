"""Compiles every kernel ahead of time, without a GPU, and tabulates what the compilers report.

    python benchmarks/aot_report.py --out benchmarks/results/aot.csv

Registers, stack and shared memory per program, spilled bytes, and how many global loads of the
latent streams are 16 bytes wide. Exits with 1 if a kernel spills or a stream's loads are not
vectorised.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastpo.bench.table import write_records
from fastpo_kernels.pair_loss import device, kernel
from fastpo_kernels.pair_noise import kernel as noise_kernel
from fastpo_kernels.pair_target import PARTS

TARGETS = {f"sm_{c}": GPUTarget("cuda", c, 32) for c in (80, 86, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
# What keeps most in registers.
HEAVIEST = {
    "adaptive, two annotators, tile 2048",
    "adaptive, 2048 pairs",
    "sdpo, tile 4096",
    "separate targets, tile 4096",
    "v and posterior redrawn, tile 1024",
    "v and posterior redrawn, two annotators, tile 1024",
    "v and posterior redrawn, tile 4096",
    "v and posterior redrawn, adaptive, two annotators, 2048 pairs",
    "flow, drawn",
}
WRITTEN = ("epsilon", "v_prediction", "flow", "none")
DIVISIBLE = [["tt.divisibility", 16]]
ALIGNED_SIZES = {"n_elements", "sizes", "strides", "target_strides", "policy_strides"}
ALIGNED_SIZES |= {"grad_strides", "latents_strides", "logvar_strides", "noisy_strides"}
DEFAULT = kernel.launch_config(16, 1 << 18, 2)


@dataclass(frozen=True)
class Target:
    """How a target comes to the kernel: the formula and the parts that are given."""

    formula: str
    parts: tuple[str, ...]

    @property
    def streams(self) -> int:
        """Loads of a tile: one of noise or of a shared target, two of what both sides have."""
        noise = ("noise" in self.parts) * (2 if self.formula == "separate" else 1)
        return noise + 2 * (("latents" in self.parts) + ("logvar" in self.parts))

    @property
    def n_streams(self) -> int:
        """As `KernelTarget.n_streams`."""
        return ("latents" in self.parts) + ("logvar" in self.parts) + ("noise" not in self.parts)

    def arguments(self, dtype: str) -> dict[str, Any]:
        """The kernels' arguments: latents in `dtype`, what the noise kernel wrote in float32."""
        ready = self.formula in ("shared", "separate") and len(self.parts) == 1
        types = {"noise": f"*{dtype if ready else 'fp32'}", "latents": f"*{dtype}"}
        types |= {"logvar": f"*{dtype}", "signal": "*fp32", "sigma": "*fp32"}
        types |= {"pair_key": "*i64", "visit": "*i64"}
        return {
            "target": tuple(types[name] if name in self.parts else None for name in PARTS),
            "target_strides": (("i32", 1),) * 3, "seed": "i64", "shift": "fp32", "scale": "fp32",
            "TARGET": self.formula,
        }  # fmt: skip


SHARED, SEPARATE = Target("shared", ("noise",)), Target("separate", ("noise",))
SCHEDULE, DRAW = ("signal", "sigma"), ("pair_key", "visit")
FORMED = {
    "v from noise": Target("v_prediction", ("noise", "latents", *SCHEDULE)),
    "flow from noise": Target("flow", ("noise", "latents")),
    "epsilon redrawn": Target("shared", DRAW),
    "v redrawn": Target("v_prediction", ("latents", *SCHEDULE, *DRAW)),
    "flow redrawn": Target("flow", ("latents", *DRAW)),
    "v and posterior redrawn": Target("v_prediction", ("latents", "logvar", *SCHEDULE, *DRAW)),
}


@dataclass(frozen=True)
class Case:
    """A kernel with its argument types (tuples for tuples, other values for constants)."""

    kernel: str
    variant: str
    dtype: str
    function: Any
    arguments: dict[str, Any]
    num_warps: int
    streams: int


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    kernel: str
    variant: str
    dtype: str
    target: str
    num_warps: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    wide_loads: int
    streams: int

    @property
    def good(self) -> bool:
        return self.spill_bytes == 0 and self.wide_loads >= self.streams


def pair_loss_forward(
    variant: str,
    dtype: str,
    *,
    objective: str | None = "dpo",
    sources: tuple[str, ...] = ("full", "full"),
    adaptive: tuple[str, str, str] | None = None,
    safeguard: bool = False,
    target: Target = SHARED,
    config: kernel.LaunchConfig = DEFAULT,
    block_p: int = 16,
    block_b: int = 16,
) -> Case:
    """The forward kernel as `launch_forward` would compile it."""
    n = len(sources)
    kinds = adaptive or (None, None, None)
    arguments = {
        "sources": tuple(f"*{dtype}" if s == "full" else "*fp32" for s in sources),
        **target.arguments(dtype), "minority_ptr": None, "statistics_ptr": None,
        "pair_weight_ptr": None, "partials_ptr": "*fp32", "ticket_ptr": "*i32",
        "loss_ptr": "*fp32" if objective else None, "stats_ptr": "*fp32",
        "n_pairs": "i32", "n_chunks": "i32", "n_elements": "i32", "sizes": ("i32",),
        "strides": (("i32", 1),) * n,
        "options": ("fp32",) * 3, "adaptive_options": ("fp32",) * (5 if adaptive else 1),
        "mu": "fp32", "READY": sum(1 << k for k, s in enumerate(sources) if s == "errors"),
        "OBJECTIVE": device.OBJECTIVES[objective] if objective else None,
        "HAS_REFERENCE": n > 1, "NORMALIZE": kinds[0],
        "WEIGHT_KIND": kinds[1], "MARGIN_KIND": kinds[2], "BATCH_BASELINE": objective == "kto",
        "SAFEGUARD": safeguard, "BLOCK_SIZE": config.block_size, "BLOCK_P": block_p,
        "BLOCK_B": block_b,
    }  # fmt: skip
    # Every stream's load is 16 bytes or more a thread, twice over for the two sides.
    streams = 2 * sum(s == "full" for s in sources) + target.streams
    function = kernel._pair_loss_fwd_kernel
    return Case("pair_loss_fwd", variant, dtype, function, arguments, config.num_warps, streams)


def pair_loss_finish(variant: str, objective: str, adaptive: tuple[str, str, str] | None) -> Case:
    """The finish alone, from the errors of three sources, as `launch_finish` would compile it."""
    kinds = adaptive or (None, None, None)
    arguments = {
        "sources": ("*fp32",) * 3, "minority_ptr": None, "sums_ptr": "*fp32",
        "pair_weight_ptr": None, "loss_ptr": "*fp32", "stats_ptr": "*fp32", "n_pairs": "i32",
        "options": ("fp32",) * 3, "adaptive_options": ("fp32",) * (5 if adaptive else 1),
        "mu": "fp32", "OBJECTIVE": device.OBJECTIVES[objective], "HAS_REFERENCE": True,
        "NORMALIZE": kinds[0], "WEIGHT_KIND": kinds[1], "MARGIN_KIND": kinds[2],
        "BATCH_BASELINE": objective == "kto", "SAFEGUARD": False, "N_SUMS": 4, "BLOCK_B": 2048,
    }  # fmt: skip
    function = kernel._pair_loss_finish_kernel
    return Case("pair_loss_finish", variant, "fp32", function, arguments, 8, 0)


def pair_loss_backward(
    variant: str, dtype: str, *, target: Target, config: kernel.LaunchConfig
) -> Case:
    """The backward kernel as `launch_backward` would compile it."""
    arguments = {
        "policy_ptr": f"*{dtype}", **target.arguments(dtype), "coefficient_ptr": "*fp32",
        "grad_loss_ptr": "*fp32", "grad_policy_ptr": f"*{dtype}",
        "n_pairs": "i32", "n_chunks": "i32", "n_elements": "i32", "sizes": ("i32",),
        "policy_strides": ("i32", 1), "grad_strides": ("i32", 1), "BLOCK_SIZE": config.block_size,
    }  # fmt: skip
    streams = 2 + target.streams
    function = kernel._pair_loss_bwd_kernel
    return Case("pair_loss_bwd", variant, dtype, function, arguments, config.num_warps, streams)


def cases() -> Iterator[Case]:
    """Every objective once; then the launches that differ in what they keep in registers."""
    for name in device.OBJECTIVES:
        sources = ("full",) if name in ("sft", "mapo") else ("full", "full")
        yield pair_loss_forward(name, "bf16", objective=name, sources=sources)
    adaptive = ("rms", "linear", "quadratic")
    three = ("full", "full", "full", "full")
    forward: dict[str, Any] = {
        "dpo": {},
        "errors only": {"objective": None, "sources": ("full",)},
        "partial sums": {"objective": None, "sources": three, "adaptive": adaptive},
        "cached reference": {"sources": ("full", "errors")},
        "sdpo": {"safeguard": True},
        "separate targets": {"target": SEPARATE},
        "adaptive, two annotators": {"sources": three, "adaptive": adaptive},
    }
    for dtype, n_elements in itertools.product(("bf16", "fp32"), (1 << 14, 1 << 18)):
        # A formed target is heaviest with large tiles.
        formed = FORMED if n_elements > 1 << 14 else {}
        launches: dict[str, Any] = forward | {k: {"target": v} for k, v in formed.items()}
        if formed:
            most = forward["adaptive, two annotators"] | launches["v and posterior redrawn"]
            launches["v and posterior redrawn, two annotators"] = most
        for name, options in launches.items():
            n_streams = sum(s == "full" for s in options.get("sources", ("full", "full")))
            n_streams += options.get("target", SHARED).n_streams
            config = kernel.launch_config(16, n_elements, n_streams)
            variant = f"{name}, tile {config.block_size}"
            yield pair_loss_forward(variant, dtype, config=config, **options)
        config = kernel.launch_config(16, n_elements, 1)
        targets = {"shared target": SHARED, "separate targets": SEPARATE, **formed}
        for name, target in targets.items():
            variant = f"{name}, tile {config.block_size}"
            yield pair_loss_backward(variant, dtype, target=target, config=config)
    for dtype, prediction in itertools.product(("bf16", "fp32"), WRITTEN):
        yield pair_noise(f"{prediction}, means", dtype, prediction, drawn=False)
        yield pair_noise(f"{prediction}, drawn", dtype, prediction, drawn=True)
    yield pair_loss_finish("adaptive, 2048 pairs", "dpo", adaptive)
    yield pair_loss_finish("kto, 2048 pairs", "kto", None)
    for n_pairs in (1, 256, 2048):
        config = kernel.launch_config(n_pairs, 1 << 22, 4)
        yield pair_loss_forward(
            f"adaptive, {n_pairs} pairs", "bf16", sources=three, adaptive=adaptive, config=config,
            block_p=int(triton.next_power_of_2(config.programs_per_pair)), block_b=n_pairs,
        )  # fmt: skip
    yield from _most_pairs(forward)


def _most_pairs(forward: dict[str, Any]) -> Iterator[Case]:
    """Formed targets where the last program's vectors are longest."""
    for dtype, name in itertools.product(
        ("bf16", "fp32"), ("v redrawn", "v and posterior redrawn")
    ):
        target = FORMED[name]
        for variant in ("dpo", "adaptive, two annotators"):
            n_full = len(forward[variant].get("sources", ("full", "full")))
            config = kernel.launch_config(2048, 1 << 18, n_full + target.n_streams)
            yield pair_loss_forward(
                f"{name}, {variant}, 2048 pairs", dtype, target=target, config=config, block_p=1,
                block_b=2048, **forward[variant],
            )  # fmt: skip


def pair_noise(variant: str, dtype: str, prediction: str, *, drawn: bool) -> Case:
    """The noise kernel as its launcher would compile it."""
    arguments = {
        "latents_ptr": f"*{dtype}", "logvar_ptr": f"*{dtype}" if drawn else None,
        "pair_key_ptr": "*i64", "visit_ptr": "*i64", "signal_ptr": "*fp32", "sigma_ptr": "*fp32",
        "noisy_ptr": "*bf16", "target_ptr": None if prediction == "none" else "*fp32",
        "timesteps_ptr": "*i64", "schedule_ptr": "*fp32",
        "n_pairs": "i32", "n_chunks": "i32", "n_elements": "i32", "sizes": ("i32",), "seed": "i64",
        **{f"{name}_strides": ("i32", 1) for name in ("latents", "logvar", "noisy", "target")},
        "low": "i32", "count": "i32", "shift": "fp32", "scale": "fp32", "TARGET": prediction,
        "BLOCK_SIZE": 1024,
    }  # fmt: skip
    function = noise_kernel._noised_pair_kernel
    return Case("noised_pair", variant, dtype, function, arguments, 4, 4 if drawn else 2)


def source_of(case: Case) -> ASTSource:
    """Signature, constants and alignment of a case, as a launch would specialise them."""
    names = case.function.arg_names
    constants, attributes = {}, {}

    def typed(value, path):
        if isinstance(value, tuple):
            return tuple(typed(v, (*path, k)) for k, v in enumerate(value))
        name = names[path[0]]
        if isinstance(value, str) and not name.isupper():
            if value[0] == "*" or name in ALIGNED_SIZES:
                attributes[path] = DIVISIBLE
            return value
        constants[path] = value
        return "constexpr"

    signature = {name: typed(case.arguments[name], (k,)) for k, name in enumerate(names)}
    return ASTSource(case.function, signature, constexprs=constants, attrs=attributes)


def _nvidia_usage(compiled) -> tuple[int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    wide = len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", compiled.asm["ptx"]))
    return int(found[1]), int(found[2]) + int(found[3]), wide


def _amd_usage(compiled) -> tuple[int, int, int]:
    text = compiled.asm["amdgcn"]

    def number(key):
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    wide = len(re.findall(r"(?:global|buffer)_load_dwordx4", text))
    return number("vgpr_count"), 4 * number("vgpr_spill_count"), wide


def compile_case(case: Case, target: str) -> Row:
    """Compiles one case for one target."""
    # A wavefront of AMD's is two warps wide: `launch_config` halves the number there.
    num_warps = case.num_warps // (TARGETS[target].warp_size // 32)
    options = {"num_warps": num_warps}
    compiled = triton.compile(source_of(case), target=TARGETS[target], options=options)
    usage = _nvidia_usage if "cubin" in compiled.asm else _amd_usage
    registers, spilled, wide = usage(compiled)
    return Row(
        case.kernel, case.variant, case.dtype, target, num_warps,
        registers, compiled.metadata.shared, spilled, wide, case.streams,
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    """Registers (and spilled bytes, where there are any) by kernel and target, in Markdown."""
    targets = list(dict.fromkeys(row.target for row in rows))
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        spills = f" ({row.spill_bytes} B spilled)" if row.spill_bytes else ""
        key = (row.kernel, row.variant, row.dtype)
        cells.setdefault(key, {})[row.target] = f"{row.registers}{spills}"
    lines = [f"| kernel | variant | dtype | {' | '.join(targets)} |", "|---" * (3 + len(targets))]
    lines[1] += "|"
    for key, found in cells.items():
        lines.append(f"| {' | '.join(key)} | {' | '.join(found.get(t, '') for t in targets)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--heaviest", action="store_true", help="one case a kernel and dtype")
    args = parser.parse_args()
    chosen = [case for case in cases() if not args.heaviest or case.variant in HEAVIEST]
    rows = [compile_case(case, target) for case in chosen for target in args.targets]
    bad = [row for row in rows if not row.good]
    if args.out:
        write_records(map(asdict, rows), [f.name for f in fields(Row)], args.out)
    print(table(rows))
    for row in bad:
        print(f"spills or narrow loads: {row}")
    print(f"{len(rows)} kernels compiled, {len(bad)} bad")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
