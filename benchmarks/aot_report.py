"""Compiles what launches compile, for every supported GPU and without one, and tabulates it.

    python benchmarks/aot_report.py --out benchmarks/results/aot.csv

The calls of `aot_cases.py` go through Triton's own binder and compiler (`fake_gpu.py`), a process a
target. Per kernel: registers and shared memory, spilled bytes, and the bytes of a pair-element
(winner and loser) that 16-byte loads and stores move, counted in the assembly. Exits with 1 if a
kernel spills, or if these are less than it must move: then a stream is read in pieces. Kernels
for tensors of different layouts index element by element, and only must not spill. What
`aot_counts.py` wrote beside `--out` becomes columns of the table; `--read` makes it again.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fake_gpu import ARCHITECTURES, Compiled, install

from fastpo.bench.measure import environment
from fastpo.bench.table import write_records
from fastpo.system.files import write_text

NAMES = {
    "pair_loss_fwd_kernel": "pair_loss_fwd",
    "pair_loss_finish_kernel": "pair_loss_finish",
    "pair_loss_bwd_kernel": "pair_loss_bwd",
    "noised_pair_kernel": "noised_pair",
}


@dataclass(frozen=True)
class Row:
    """One compiled kernel; bytes are those of a pair-element, empty where none are asked for."""

    kernel: str
    variant: str
    dtype: str
    target: str
    num_warps: int
    tile: int | str
    registers: int
    shared_bytes: int
    spill_bytes: int
    wide_bytes: float | str
    least_bytes: int | str
    triton: str
    commit: str
    date: str

    @property
    def good(self) -> bool:
        """Spills nothing, and moves all that it must in 16-byte pieces.

        Where the last program reads its partials so too, as AMD's compiler lets it, it moves more.
        """
        wide = not self.least_bytes or float(self.wide_bytes) >= float(self.least_bytes)
        return self.spill_bytes == 0 and wide


def _nvidia_usage(kernel: Any) -> tuple[int, int, int]:
    """Registers, spilled bytes, 16-byte accesses."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    wide = re.findall(r"(?:ld|st)\.global[\w.:]*\.v4\.b32", kernel.asm["ptx"])
    return int(found[1]), int(found[2]) + int(found[3]), len(wide)


def _amd_usage(kernel: Any) -> tuple[int, int, int]:
    text = kernel.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    wide = re.findall(r"(?:global|buffer)_(?:load|store)_dwordx4", text)
    return number("vgpr_count"), 4 * number("vgpr_spill_count"), len(wide)


def row_of(made: Compiled, variant: str, dtype: str, target: str, least: int, about: dict) -> Row:
    """What the compiler reports of a kernel; `least` is 0 where no wide accesses are asked for."""
    kernel, name = made.kernel, NAMES[made.name]
    usage = _nvidia_usage if "cubin" in kernel.asm else _amd_usage
    registers, spilled, wide = usage(kernel)
    names = kernel.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items()}
    tile, warps = constants.get("BLOCK_SIZE", ""), kernel.metadata.num_warps
    threads = warps * kernel.metadata.target.warp_size
    return Row(
        name, variant, dtype, target, warps, tile, registers, kernel.metadata.shared, spilled,
        wide * 16 * threads / tile if least else "", least or "",
        about["triton"], about["commit"], about["date"],
    )  # fmt: skip


def rows_of(target: str, *, heaviest: bool) -> Iterator[Row]:
    """Compiles every case for one target, in this process."""
    from aot_cases import cases

    gpu, about = install(target), environment()
    for case in cases():
        if heaviest and not case.heavy:
            continue
        before = len(gpu.compiled)
        case.run()
        for made in gpu.compiled[before:]:
            least = {"pair_loss_fwd": case.forward, "noised_pair": case.forward}
            least |= {"pair_loss_bwd": case.backward}
            name = NAMES[made.name]
            wanted = 0 if case.strided else least.get(name, 0)
            yield row_of(made, case.variant, case.dtype, target, wanted, about)


def read(path: Path) -> list[Row]:
    """The rows of a CSV."""
    kinds = {"int": int, "int | str": int, "float | str": float}
    numbers = {f.name: kinds[str(f.type)] for f in fields(Row) if f.type in kinds}
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    return [
        Row(**{k: numbers[k](v) if k in numbers and v else v for k, v in row.items()})  # pyright: ignore[reportArgumentType]
        for row in found
    ]


Counted = dict[tuple[str, str, str], list[str]]  # by kernel, call and dtype: cells


def counted(path: Path) -> Counted:
    """Cells of `aot_counts.py`: instructions of a pair-element, bank conflicts and requests."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            (r["kernel"], r["variant"], r["dtype"]): [
                f"{float(r['executed']):.1f}" if float(r["executed"]) else "",
                f"{int(r['bank_conflicts']):,} of {int(r['shared_requests']):,}",
            ]
            for r in csv.DictReader(file)
        }


def _cells(found: dict[str, Row], targets: list[str], executed: list[str]) -> list[str]:
    """One kernel's, by target."""
    row = next(iter(found.values()))
    shared = {int(r.shared_bytes) for r in found.values()}
    cells = [
        f"{row.tile:g}" if row.tile else "",
        f"{row.wide_bytes:g}" if row.wide_bytes else "",
        *executed,
        f"{min(shared)}" if len(shared) == 1 else f"{min(shared)} to {max(shared)}",
    ]
    for target in targets:
        one = found.get(target)
        spilled = f" ({one.spill_bytes:g} B spilled)" if one and one.spill_bytes else ""
        cells.append("" if one is None else f"{one.registers:g}{spilled}")
    return cells


def table(rows: list[Row], counts: Counted) -> str:
    """One line a kernel in Markdown: tile, bytes, counts, shared memory, registers by target."""
    targets = list(dict.fromkeys(row.target for row in rows))
    lines: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row.kernel, row.variant, row.dtype), {})[row.target] = row
    heads = ["kernel", "call", "dtype", "tile", "B/element"]
    heads += ["executed", "bank conflicts"] if counts else []
    heads += ["shared, B", *targets]
    text = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for key, found in lines.items():
        executed = counts.get(key, ["", ""]) if counts else []
        text.append(f"| {' | '.join((*key, *_cells(found, targets, executed)))} |")
    return "\n".join(text)


def document(rows: list[Row], counts: Counted) -> str:
    """The table with its conditions."""
    first, names = rows[0], list(dict.fromkeys(row.commit for row in rows))
    commits = f"commit{'s' if names[1:] else ''} {', '.join(names)}"
    executed = (
        "Executed: PTX instructions of a pair-element, on sm_90; bank conflicts: passes over "
        "shared memory's banks that conflicts add to a launch's requests; both by kind in "
        "[aot_counts.md](aot_counts.md). "
    )
    return (
        f"# Kernels, compiled ahead of time\n\nRegisters a thread by target, none of "
        f"{len(rows)} kernels spilling. B/element: bytes of a pair-element that 16-byte loads and "
        f"stores move, which is all that the call must move; blank where layouts differ. "
        f"{executed if counts else ''}Triton {first.triton}, {commits}, "
        f"{first.date}.\n\n{table(rows, counts)}\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="CSV file; the table goes beside it")
    parser.add_argument("--targets", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--heaviest", action="store_true", help="what keeps most in registers")
    parser.add_argument("--read", type=Path, help="a CSV file of before, to make its table again")
    args = parser.parse_args()
    if args.read:
        rows, args.out = read(args.read), args.read
    elif len(args.targets) == 1:
        rows = list(rows_of(args.targets[0], heaviest=args.heaviest))
    else:
        rows = [row for target in args.targets for row in _elsewhere(target, args.heaviest)]
    counts = counted(args.out.with_name("aot_counts.csv")) if args.out else {}
    if args.out and not args.read:
        write_records(map(asdict, rows), [f.name for f in fields(Row)], args.out)
    bad = [row for row in rows if not row.good]
    if args.out and not bad:
        write_text(args.out.with_suffix(".md"), document(rows, counts))
    print(table(rows, counts))
    for row in bad:
        print(f"spills, or moves fewer bytes than it must in 16-byte pieces: {row}")
    print(f"{len(rows)} kernels compiled, {len(bad)} bad")
    return bool(bad)


def _elsewhere(target: str, heaviest: bool) -> list[Row]:
    """One target's rows, from a process of its own: Triton takes one driver."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.csv"
        command = [sys.executable, __file__, "--targets", target, "--out", str(out)]
        command += ["--heaviest"] if heaviest else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ)
        if not out.exists():
            raise RuntimeError(f"no rows for {target}: {done.stdout}")
        return read(out)


if __name__ == "__main__":
    sys.exit(main())
