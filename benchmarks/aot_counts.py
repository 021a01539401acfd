"""What the kernels of `aot_cases.py` execute, counted on the PTX machine without a GPU.

    python benchmarks/aot_counts.py --out benchmarks/results/aot_counts.csv

A forward launch is its programs, all alike, and what the last of them does to finish. Both are
found from two small launches of the same code, one of twice the programs: `aot_small.py`.
Instructions and bytes are those of threads, per pair-element (winner and loser); what the last
program adds, and requests and conflicts of shared memory, are of a whole launch. Beside the table's
calls there are those of one of them by other tiles.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from aot_report import NAMES
from fake_gpu import install

from fastpo.bench.measure import environment
from fastpo.bench.table import write_records
from fastpo.system.files import write_text
from tests.ptx_machine import Machine, parse
from tests.ptx_machine.counts import KINDS, Counts
from tests.ptx_machine.launch import LaunchHook

TARGET = "sm_90"
WIDTHS = (16, 8, 4, 2)
TILES = ((1024, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8), (8192, 8))
Launches = dict[str, tuple[int, Counts]]  # by kernel: programs, and what they executed


@dataclass(frozen=True)
class Row:
    """One kernel of one call; empty where it has no elements."""

    kernel: str
    variant: str
    dtype: str
    instructions: dict[str, float]
    bytes: dict[str, float]
    finish_instructions: int
    shared_requests: int
    bank_conflicts: int
    triton: str
    commit: str
    date: str

    def record(self) -> dict[str, Any]:
        """As one level of columns."""
        found = asdict(self)
        found["executed"] = sum(self.instructions.values())
        found |= found.pop("instructions") | found.pop("bytes")
        return {name: found[name] for name in COLUMNS}


BYTES = [f"{name}_{width}" for name in ("ld", "st") for width in WIDTHS]
_NESTED = {"instructions": ["executed", *KINDS], "bytes": BYTES}
COLUMNS = [c for f in fields(Row) for c in _NESTED.get(f.name, [f.name])]


class _Programs(Machine):
    """Executes nothing, but notes launches: their code and how many programs they have."""

    def __init__(self) -> None:
        super().__init__()
        self.programs: dict[str, int] = {}
        self.texts: dict[str, str] = {}

    def launch(self, text, grid, *_) -> None:
        name = parse(text).name
        self.texts[name], self.programs[name] = text, grid[0] * grid[1] * grid[2]


class _Counting(Machine):
    """Executes once, in step; notes code, programs and the counts of a kernel's first launch."""

    def __init__(self) -> None:
        super().__init__()
        self.noted = _Programs()
        self.first: dict[str, Counts] = {}

    def launch(self, text, grid, *given) -> None:
        self.noted.launch(text, grid)
        super().launch(text, grid, *given)
        name = parse(text).name
        self.first.setdefault(name, deepcopy(self.counts[name]))


def _small_launches(
    hook: LaunchHook, call: Any, size: int, full: Any, texts: dict[str, str]
) -> Launches:
    """The call's launches by `aot_small.small_run`."""
    from aot_small import small_run

    hook.machine = machine = _Counting()
    small_run(call, size, full)
    if machine.noted.texts != texts:
        raise AssertionError(f"{call.variant}, {call.dtype}: other code than in the full size")
    return {name: (machine.noted.programs[name], machine.first[name]) for name in texts}


def _parts(one: tuple[int, Counts], two: tuple[int, Counts]) -> tuple[Any, Any]:
    """Functions of a number that a launch counts: of a program, and of what the last adds."""
    (few, a), (many, b) = one, two
    if few == many:
        return (lambda of: 0.0), (lambda of: of(a))
    return (
        lambda of: (of(b) - of(a)) / (many - few),
        lambda of: of(a) - few * (of(b) - of(a)) / (many - few),
    )


def row_of(
    call: Any, name: str, programs: int, small: list[tuple[int, Counts]], about: dict[str, Any]
) -> Row:
    """The launch of one kernel in the full size, of `programs`."""
    each, last = _parts(*small)
    per_element = programs / (call.batch.pairs * call.batch.rows()[0].numel())

    def whole(of: Any) -> int:
        return round(last(of) + programs * each(of))

    def moved(instruction: str, width: int) -> Any:
        return lambda counts: counts.moved["global", instruction, width]

    finish = NAMES[name] in ("pair_loss_fwd", "pair_loss_finish")
    return Row(
        NAMES[name], call.variant, call.dtype,
        {k: per_element * each(lambda c, k=k: c.by_kind()[k]) for k in KINDS},
        {f"{i}_{w}": per_element * each(moved(i, w)) for i in ("ld", "st") for w in WIDTHS},
        round(last(lambda c: c.executed.total())) if finish else 0, whole(lambda c: c.requests),
        whole(lambda c: c.conflicts), about["triton"], about["commit"], about["date"],
    )  # fmt: skip


def rows_of(hook: LaunchHook, calls: list[Any]) -> Iterator[Row]:
    """Counts of every kernel of these calls, the first time that its code comes up."""
    from aot_cases import NoiseCall
    from aot_small import full_shape

    about, seen = environment(), set()
    for call in calls:
        hook.machine = noted = _Programs()
        call.case().run()
        new = {name: text for name, text in noted.texts.items() if text not in seen}
        seen |= set(new.values())
        full = None if isinstance(call, NoiseCall) else full_shape(call)
        small = [_small_launches(hook, call, n, full, noted.texts) for n in (1, 2) if new]
        for name in new:
            yield row_of(call, name, noted.programs[name], [s[name] for s in small], about)


def rows_by_tile(hook: LaunchHook, call: Any) -> Iterator[Row]:
    """The forward kernel of a call by tiles and warps, a program a tile."""
    from aot_small import FullShape, compiled_as, full_shape

    from fastpo_kernels.pair_loss.gpu.launch import LaunchConfig

    about, own = environment(), full_shape(call)
    for block, warps in TILES:
        programs = -(-own.elements // block)
        full = FullShape(own.pairs, own.elements, LaunchConfig(block, programs, warps))
        hook.machine = noted = _Programs()
        with compiled_as(full, programs):
            call.case().run()
        small = [_small_launches(hook, call, n, full, noted.texts) for n in (1, 2)]
        named = replace(call, variant=f"{call.variant}, tiles of {block} by {warps} warps")
        name = "pair_loss_fwd_kernel"
        yield row_of(named, name, noted.programs[name], [s[name] for s in small], about)


def executed(hook: LaunchHook, call: Any) -> dict[str, Counts]:
    """Counts of a call in its own size, which takes long."""
    from aot_small import filled

    hook.machine = machine = Machine()
    call.gradient(filled(call.empty(call.batch)))
    return machine.counts


def counting() -> LaunchHook:
    """Makes this process one that compiles for `TARGET` and counts."""
    library = install(TARGET).library
    assert library is not None
    return LaunchHook(library, Machine())


def table(records: list[dict[str, Any]]) -> str:
    """One line a kernel, in Markdown."""
    heads = ["kernel", "call", "dtype", "all", *KINDS, "loaded, B", "stored, B"]
    heads += ["last program", "shared requests", "bank conflicts"]
    text = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in records:
        kinds = [float(r[k]) for k in ("executed", *KINDS)]
        cells = [r["kernel"], r["variant"], r["dtype"]]
        cells += [f"{n:.2f}" if kinds[0] else "" for n in kinds]
        for name in ("ld", "st"):
            widths = {w: float(r[f"{name}_{w}"]) for w in WIDTHS}
            cells.append(", ".join(f"{n:.3g} by {w}" for w, n in widths.items() if n >= 0.005))
        cells += [f"{int(r[c]):,}" for c in COLUMNS[-6:-3]]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def document(records: list[dict[str, Any]]) -> str:
    """The table with its conditions."""
    first = records[0]
    return (
        f"# Kernels, executed\n\nPTX instructions that threads of {TARGET} execute per "
        f"pair-element, by kind, and bytes that they load from and store to global memory, by the "
        f"bytes of one access; of a whole launch, what the last program executes to finish, "
        f"warps' requests to shared memory, and passes over its 32 banks that conflicts add. "
        f"Threads that load one number each count its bytes each. Counted by `aot_counts.py`. "
        f"Triton {first['triton']}, commit {first['commit']}, {first['date']}.\n\n"
        f"{table(records)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="CSV file; the table goes beside it")
    parser.add_argument("--only", default="", help="calls whose name holds this")
    args = parser.parse_args()
    hook = counting()
    from aot_cases import calls

    chosen = [call for call in calls() if args.only in call.variant]
    records = [row.record() for row in rows_of(hook, chosen)]
    if not args.only:
        (tiled,) = (c for c in chosen if (c.variant, c.dtype) == ("dpo, 16 pairs", "bf16"))
        records += [row.record() for row in rows_by_tile(hook, tiled)]
    if args.out:
        write_records(records, COLUMNS, args.out)
        write_text(args.out.with_suffix(".md"), document(records))
    print(table(records))


if __name__ == "__main__":
    main()
