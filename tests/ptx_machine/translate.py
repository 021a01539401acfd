"""From parsed instructions to the steps of `steps.py`."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np

from .arithmetic import contracted
from .errors import UnknownInstruction
from .instructions import UNSIGNED, Operation, bits_of, operation
from .memory import SHARED_BASE
from .parser import Address, Immediate, Instruction, Operand, Parsed, Register, Vector
from .steps import (
    Access,
    Atomic,
    Barrier,
    Branch,
    Compute,
    Exit,
    Kernel,
    MatrixLoad,
    Shuffle,
    Slots,
    Step,
    extended,
    fill_live,
    runner,
)

SPECIAL = ("tid", "ntid", "ctaid", "nctaid")


def translate(parsed: Parsed, seed: int) -> Kernel:
    """Translates for the device that `seed` stands for.

    Raises:
        UnknownInstruction: naming the first instruction that is not known.
    """
    translator = _Translator(parsed, seed)
    steps = [translator.step(k, one) for k, one in enumerate(parsed.instructions)]
    fill_live(steps)
    widths = [s.width for s in steps if isinstance(s, Access)]
    return Kernel(
        parsed, steps, translator.initial, translator.special, translator.parameters,
        min(widths, default=4),
    )  # fmt: skip


class _Translator:
    def __init__(self, parsed: Parsed, seed: int) -> None:
        self.parsed, self.seed = parsed, seed
        self.rng = np.random.default_rng(seed)
        self.initial: Slots = []
        self.special: dict[str, int] = {}
        self.parameters: dict[str, int] = {}
        self._slots: dict[object, int] = {}
        self._bits: list[int] = []
        self._targets = set(parsed.labels.values())
        self._products: dict[int, tuple[int, int]] = {}  # slots that hold a product of slots

    def step(self, index: int, one: Instruction) -> Step:
        """One instruction."""
        if index in self._targets:
            self._products.clear()
        name = one.opcode[0]
        try:
            build = _BUILDERS.get(name)
            found = build(self, one) if build else self._compute(one)
        except UnknownInstruction as error:
            raise UnknownInstruction(f"line {one.line}: {one.text} ({error})") from error
        if one.guard is not None:
            found.guard, found.negated = self.slot(one.guard, 1), one.guard.negated
            found.reads = (*found.reads, found.guard, *found.writes)  # what is not written stays
        for slot in found.writes:
            self._products = {
                k: v for k, v in self._products.items() if slot != k and slot not in v
            }
        self._remember(one, found)
        return found

    def slot(self, operand: Operand | None, bits: int) -> int:
        """Where an operand lies; `bits` is the width of a constant."""
        if isinstance(operand, Register):
            key: object = operand.name
        elif isinstance(operand, Immediate):
            key = (operand.text, bits)
        elif isinstance(operand, str) and operand in self.parsed.shared:
            key = ("shared", bits)
        else:
            raise UnknownInstruction(f"operand {operand}")
        if key not in self._slots:
            self._slots[key] = len(self.initial)
            self._bits.append(bits)
            self.initial.append(self._first(operand, bits))
        return self._slots[key]

    def _first(self, operand: Operand, bits: int) -> np.ndarray:
        """A constant; of a register, bits at random: nobody may count on them."""
        if isinstance(operand, Immediate):
            return constant(operand.text, bits)
        if isinstance(operand, str):
            return np.array([SHARED_BASE], UNSIGNED[bits])
        assert isinstance(operand, Register)
        prefix = operand.name.rstrip("0123456789")
        if prefix in self.parsed.registers:
            self._bits[-1] = self.parsed.registers[prefix]
        elif operand.name.split(".")[0].strip("%") in SPECIAL:
            self._bits[-1] = 32
            self.special[operand.name] = len(self.initial)
        elif operand.name != f"%_{bits}":
            raise UnknownInstruction(f"register {operand.name}")
        return self.rng.integers(0, 2 ** min(self._bits[-1], 62), 1).astype(
            UNSIGNED[self._bits[-1]]
        )

    def _compute(self, one: Instruction) -> Compute:
        if one.opcode[0] == "mov" and any(isinstance(o, Vector) for o in one.operands):
            return self._repack(one)
        meaning = operation(one.opcode, self.seed)
        target, *given = one.operands
        if len(given) != len(meaning.sources):
            raise UnknownInstruction("number of operands")
        reads = [self.slot(o, b) for o, b in zip(given, meaning.sources, strict=True)]
        function = self._fitted(meaning, given, reads)
        write = self.slot(target, meaning.result)
        function = _widened(function, meaning, self._bits[write])
        if fused := self._contraction(one, reads):
            function, reads = fused
        guard = None if one.guard is None else self.slot(one.guard, 1)
        negated = one.guard is not None and one.guard.negated
        run = runner(function, tuple(reads), write, guard, negated)
        return Compute(one, tuple(reads), (write,), run=run)

    def _fitted(
        self, meaning: Operation, given: list[Operand], reads: list[int]
    ) -> Callable[..., np.ndarray]:
        """The function behind what narrows its operands, and turns predicates with `!`."""
        function = meaning.function
        narrow = [
            None if self._bits[s] == b else UNSIGNED[b]
            for s, b in zip(reads, meaning.sources, strict=True)
        ]
        turned = [isinstance(o, Register) and o.negated for o in given]
        if not any(turned) and all(n is None for n in narrow):
            return function

        def apply(*operands: np.ndarray) -> np.ndarray:
            fitted = (
                a if n is None else a.astype(n) for a, n in zip(operands, narrow, strict=True)
            )
            return function(*(~a if t else a for a, t in zip(fitted, turned, strict=True)))

        return apply

    def _remember(self, one: Instruction, found: Step) -> None:
        if one.opcode == ("mul", "f32") and one.guard is None:
            if found.writes[0] not in found.reads:
                self._products[found.writes[0]] = (found.reads[0], found.reads[1])

    def _contraction(
        self, one: Instruction, reads: list[int]
    ) -> tuple[Callable[..., np.ndarray], list[int]] | None:
        """`mul` and `add` without `.rn` may be rounded once; this device does every other time."""
        if one.opcode not in (("add", "f32"), ("sub", "f32")) or self.rng.integers(2):
            return None
        sign = 1 if one.opcode[0] == "add" else -1
        for k, s in enumerate(reads):
            if s in self._products:
                function = contracted(1, sign) if k == 0 else contracted(sign, 1)
                return function, [*self._products[s], reads[1 - k]]
        return None

    def _repack(self, one: Instruction) -> Compute:
        """`mov` between a register and its parts."""
        target, source = one.operands
        bits = bits_of(one.opcode[-1])
        if isinstance(source, Vector):
            part = bits // len(source.parts)
            reads = tuple(self.slot(p, part) for p in source.parts)
            write = self.slot(target, bits)

            def pack(slots: Slots) -> None:
                kind = UNSIGNED[bits]
                value = slots[reads[0]].astype(kind)
                for k, s in enumerate(reads[1:], 1):
                    value = value | slots[s].astype(kind) << kind(k * part)
                slots[write] = value

            return Compute(self._unguarded(one), reads, (write,), run=pack)
        assert isinstance(target, Vector)
        part = bits // len(target.parts)
        read = self.slot(source, bits)
        writes = [(k, self.slot(p, part)) for k, p in enumerate(target.parts) if p is not None]

        def unpack(slots: Slots) -> None:
            kind = UNSIGNED[bits]
            for k, s in writes:
                slots[s] = (slots[read] >> kind(k * part)).astype(UNSIGNED[part])

        written = tuple(s for _, s in writes)
        return Compute(self._unguarded(one), (read,), written, run=unpack)

    def _unguarded(self, one: Instruction) -> Instruction:
        if one.guard is not None:
            raise UnknownInstruction("with a predicate")
        return one

    # Instructions that do more than compute.

    def parameter(self, one: Instruction) -> Compute:
        """`ld.param`."""
        target, address = one.operands
        if not isinstance(address, Address) or address.base not in self.parsed.parameters:
            raise UnknownInstruction("parameter")
        bits = bits_of(one.opcode[-1])
        whole = self.parsed.parameters[address.base] * 8 == bits
        if address.offset or len(one.opcode) != 3 or not whole:
            raise UnknownInstruction("part of a parameter")
        write = self.slot(target, bits)
        key = ("parameter", address.base, bits)
        if key not in self._slots:
            self._slots[key] = len(self.initial)
            self._bits.append(bits)
            self.initial.append(np.zeros(1, UNSIGNED[bits]))
            self.parameters[str(address.base)] = self._slots[key]
        read, wide = self._slots[key], self._bits[write]
        signed = one.opcode[-1][0] == "s"

        def load(slots: Slots) -> None:
            slots[write] = extended(slots[read], wide, signed=signed)

        return Compute(self._unguarded(one), (read,), (write,), run=load)

    def access(self, one: Instruction) -> Step:
        """`ld` and `st` of global and shared memory."""
        name, space, *rest, kind = one.opcode
        if space == "param":
            return self.parameter(one)
        counts = {"v2": 2, "v4": 4, "v8": 8}
        count = next((counts[r] for r in rest if r in counts), 1)
        if space not in ("global", "shared") or set(rest) - set(counts) - _CACHES:
            raise UnknownInstruction("kind of access")
        load = name == "ld"
        address, data = one.operands[::-1] if load else one.operands
        assert isinstance(address, Address)
        parts = data.parts if isinstance(data, Vector) else (data,)
        bits = bits_of(kind)
        if len(parts) != count or bits % 8:
            raise UnknownInstruction("number of operands")
        # What a load throws away, `_`, has a register of its own.
        slots = tuple(self.slot(Register(f"%_{bits}") if p is None else p, bits) for p in parts)
        at = self.slot(address.base, 64 if space == "global" else 32)
        return Access(
            one, (at,) if load else (at, *slots), slots if load else (),
            space=space, load=load, width=bits // 8, count=count, signed=kind[0] == "s",
            address=at, offset=address.offset,
        )  # fmt: skip

    def atomic(self, one: Instruction) -> Atomic:
        """`atom` and `red` on global memory."""
        name, *rest, kind = one.opcode
        orders = [r for r in rest if r in ("relaxed", "acquire", "release", "acq_rel")]
        scopes = [r for r in rest if r in ("gpu", "sys", "cta")]
        what = [r for r in rest if r in ("add", "min", "max", "exch", "cas", "and", "or", "xor")]
        known = {*orders, *scopes, *what, "global"}
        if len(what) != 1 or "global" not in rest or set(rest) - known or kind[0] == "f":
            raise UnknownInstruction("kind of atomic")
        target, operands = (one.operands[0], one.operands[1:])
        if name == "red":
            target, operands = None, one.operands
        address, *given = operands
        assert isinstance(address, Address)
        bits = bits_of(kind)
        reads = (self.slot(address.base, 64), *(self.slot(o, bits) for o in given))
        writes = () if target is None else (self.slot(target, bits),)
        return Atomic(
            one, reads, writes, name=what[0], kind=kind, order=(orders or ["relaxed"])[0],
            scope=(scopes or ["gpu"])[0], offset=address.offset,
        )  # fmt: skip

    def shuffle(self, one: Instruction) -> Shuffle:
        """`shfl.sync`."""
        if one.opcode[1] != "sync" or one.opcode[3:] != ("b32",) or len(one.opcode) != 4:
            raise UnknownInstruction("kind of shuffle")
        targets, given = one.operands[:-4], one.operands[-4:]
        writes = tuple(self.slot(t, b) for t, b in zip(targets, (32, 1), strict=False))
        reads = tuple(self.slot(o, 32) for o in given)
        return Shuffle(self._unguarded(one), reads, writes, mode=one.opcode[2])

    def matrix_load(self, one: Instruction) -> MatrixLoad:
        """`ldmatrix` of 8 x 8 matrices of 16 bits."""
        target, address = one.operands
        counts = {"x1": 1, "x2": 2, "x4": 4}
        form = ("ldmatrix", "sync", "aligned", "m8n8", one.opcode[4], "shared", "b16")
        if one.opcode != form or not isinstance(target, Vector) or not isinstance(address, Address):
            raise UnknownInstruction("kind of matrix load")
        if len(target.parts) != counts.get(one.opcode[4]):
            raise UnknownInstruction("number of operands")
        writes = tuple(self.slot(p, 32) for p in target.parts)
        reads = (self.slot(address.base, 32),)
        return MatrixLoad(self._unguarded(one), reads, writes, offset=address.offset)

    def branch(self, one: Instruction) -> Branch:
        """`bra`."""
        (label,) = one.operands
        if set(one.opcode[1:]) - {"uni"} or label not in self.parsed.labels:
            raise UnknownInstruction("kind of branch")
        return Branch(one, target=self.parsed.labels[str(label)])

    def barrier(self, one: Instruction) -> Barrier:
        """`bar.sync 0` and `barrier.sync 0`: all threads."""
        plain = one.opcode in (("bar", "sync"), ("barrier", "sync"), ("barrier", "sync", "aligned"))
        if not plain or [getattr(o, "text", "") for o in one.operands] != ["0"]:
            raise UnknownInstruction("kind of barrier")
        return Barrier(self._unguarded(one))

    def exit(self, one: Instruction) -> Exit:
        """`ret` and `exit`."""
        return Exit(one)


_CACHES = {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L1_evict_last", "L1_evict_first"}
_CACHES |= {"L1_evict_normal", "L1_no_allocate", "weak"}
_BUILDERS: dict[str, Callable[[_Translator, Instruction], Step]] = {
    "ld": _Translator.access, "st": _Translator.access, "atom": _Translator.atomic,
    "red": _Translator.atomic, "shfl": _Translator.shuffle, "bra": _Translator.branch,
    "bar": _Translator.barrier, "barrier": _Translator.barrier, "ret": _Translator.exit,
    "exit": _Translator.exit, "ldmatrix": _Translator.matrix_load,
}  # fmt: skip


def constant(text: str, bits: int) -> np.ndarray:
    """A number as written: `12`, `-1`, `0x1F`, `0f3F800000`, `0d…`."""
    if bits == 1:
        return np.array([int(text, 0) != 0])
    if text[:2].lower() == "0f" and bits == 32:
        return np.array([int(text[2:], 16)], np.uint32)
    if text[:2].lower() == "0d" and bits == 64:
        return np.array([int(text[2:], 16)], np.uint64)
    if "." in text:
        form = {32: ("f", "I"), 64: ("d", "Q")}[bits]
        value = struct.unpack(form[1], struct.pack(form[0], float(text)))[0]
    else:
        value = int(text.rstrip("U"), 0)
    return np.array([value & ((1 << bits) - 1)], UNSIGNED[bits])


def _widened(
    function: Callable[..., np.ndarray], meaning: Operation, bits: int
) -> Callable[..., np.ndarray]:
    """The result as a register of `bits` holds it."""
    if bits == meaning.result:
        return function
    if bits < meaning.result or meaning.result == 1:
        raise UnknownInstruction(f"a result of {meaning.result} bits in {bits}")
    return lambda *operands: extended(function(*operands), bits, signed=meaning.signed)
