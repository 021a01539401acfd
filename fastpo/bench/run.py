"""Goes through the cases, the most important first, until they or the budget end."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fastpo.bench import losses, noise
from fastpo.bench.cases import DIRECTIONS, Case
from fastpo.bench.losses import COMPILE_MODES
from fastpo.bench.measure import (
    Call,
    Clock,
    copy_bandwidth,
    device,
    environment,
    free_bytes,
    make_clock,
    measure,
)
from fastpo.bench.table import Row, noted_row, timed_rows
from fastpo.errors import ConfigError

NAMES = {"pair_loss": tuple(losses.OBJECTIVES), "pair_noise": noise.PREDICTIONS}


def providers_of(op: str) -> tuple[str, ...]:
    """The providers that this machine can time; the CPU has one compiled mode and no graphs."""
    known = losses.PROVIDERS if op == "pair_loss" else noise.PROVIDERS
    if device() == "cuda":
        return known
    # The noise's default on a CPU is its reference.
    absent = {"compile-max", "ours-graph"} | ({"ours"} if op == "pair_noise" else set())
    return tuple(p for p in known if p not in absent)


@dataclass
class Options:
    """What a run measures with: seconds a row's providers share, seconds in all."""

    seconds: float = 0.3
    budget_seconds: float = float("inf")
    providers: Sequence[str] | None = None
    directions: Sequence[str] = DIRECTIONS
    commit: str | None = None


@dataclass
class Run:
    """Measures cases; `rows` grows, `unmeasured` holds the cases for which no time was left."""

    cases: Sequence[Case]
    options: Options
    rows: list[Row] = field(default_factory=list)
    unmeasured: list[Case] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clock: Clock = make_clock()
        self.copy = copy_bandwidth(self.clock)
        self.where = {"clock": self.clock.name, **environment(self.options.commit)}

    def __iter__(self) -> Iterator[tuple[Case, list[Row]]]:
        """Measures case by case; stops before one that would likely not end in the budget."""
        start, lately = time.perf_counter(), deque([0.0], maxlen=3)  # the first case starts cold
        for k, case in enumerate(self.cases):
            began = time.perf_counter()
            if began - start + max(lately) > self.options.budget_seconds:
                self.unmeasured = list(self.cases[k:])
                return
            new = self._measure(case)
            self.rows += new
            lately.append(time.perf_counter() - began)
            yield case, new

    def go_on_from(self, rows: Sequence[Row]) -> None:
        """Takes the rows of an earlier run, and leaves out the cases that they hold.

        Raises:
            ConfigError: They come from another device, other versions or another commit.
        """
        for name in ("device", "torch", "triton", "commit"):
            found = {asdict(row)[name] for row in rows} - {self.where[name]}
            if found:
                raise ConfigError(
                    f"cannot go on from rows whose {name} is {sorted(found)[0]!r}; this is "
                    f"{self.where[name]!r}"
                )
        done = {Case(r.op, r.case, r.latents, r.dtype, r.pairs) for r in rows}
        self.rows = list(rows)
        self.cases = [case for case in self.cases if case not in done]

    def _labels(self, case: Case) -> dict[str, Any]:
        return {
            "op": case.op, "case": case.name, "latents": case.latents, "pairs": case.pairs,
            "dtype": case.dtype, **self.where,
        }  # fmt: skip

    def _measure(self, case: Case) -> list[Row]:
        module, labels = losses if case.op == "pair_loss" else noise, self._labels(case)
        needed, free = module.needed_bytes(case), free_bytes()
        if needed > free:
            gib = [f"{n / 2**30:.1f} GiB" for n in (needed, free)]
            return [noted_row(f"skipped, needs about {gib[0]}, {gib[1]} are free", labels)]
        x: Any = module.inputs(case)
        wrong = module.disagreement(case, x)
        if wrong:
            self.failures.append(f"{case}: {wrong}")
            return [noted_row(wrong, labels)]
        providers = self.options.providers or providers_of(case.op)
        with _compiler(providers):
            rows = self._passes(case, x, providers, labels)
        del x
        gc.collect()
        if device() == "cuda":
            torch.cuda.empty_cache()
        return rows

    def _passes(
        self, case: Case, x: Any, providers: Sequence[str], labels: dict[str, Any]
    ) -> list[Row]:
        rows = []
        if case.op == "pair_loss":
            found = losses.losses(case, x, providers)
            makers = {d: losses.passes(case, x, found, d) for d in self.options.directions}
            n_bytes = losses.least_bytes(case)
        else:
            makers, n_bytes = {"fwd": noise.calls(case, x, providers)}, noise.least_bytes(case)
        for direction, makes in makers.items():
            told = {**labels, "direction": direction}
            calls, broken = self._warm(case, makes)
            rows += [noted_row(note, {**told, "provider": name}) for name, note in broken.items()]
            if calls:
                timings = measure(calls, self.options.seconds, self.clock)
                rows += timed_rows(timings, n_bytes[direction], self.copy, told)
        return rows

    def _warm(
        self, case: Case, makes: dict[str, Callable[[], Call]]
    ) -> tuple[dict[str, Call], dict[str, str]]:
        """Calls that ran once, and why the others did not: one provider must not end the run."""
        calls, broken = {}, {}
        for name, make in makes.items():
            try:
                call = make()
                call()
            except Exception as error:
                reason = (str(error).strip().splitlines() or [""])[0][:200]
                broken[name] = f"{type(error).__name__}: {reason}"
                if name not in COMPILE_MODES:  # what the compiler cannot do is a note, no failure
                    self.failures.append(f"{case}, {name}: {broken[name]}")
            else:
                calls[name] = call
        return calls, broken


@contextmanager
def _compiler(providers: Sequence[str]) -> Iterator[None]:
    """Prepares torch.compile for a case, where one of the providers needs it."""
    if not any(p in COMPILE_MODES for p in providers):
        yield
        return
    from torch._functorch import config

    torch._dynamo.reset()
    # A saved graph is replayed to time the backward pass alone.
    before, config.donated_buffer = config.donated_buffer, False
    try:
        yield
    finally:
        config.donated_buffer = before
