"""Instructions that only compute: from an opcode to a function of raw bits.

Control, memory, barriers, shuffles and atomics are in `translate.py` and behind it. A modifier that
is not listed with its instruction is unknown, however harmless it may be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import arithmetic as ar
from .errors import UnknownInstruction

KINDS: dict[str, type] = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64,
    "u64": np.uint64, "s64": np.int64, "f16": np.float16, "f32": np.float32, "f64": np.float64,
}  # fmt: skip
UNSIGNED: dict[int, type] = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
Opcode = tuple[str, ...]


@dataclass(frozen=True)
class Operation:
    """What an opcode does.

    Attributes:
        function: from the operands' bits to the result's.
        sources: bits of each operand, 1 for predicates.
        result: bits of the result.
        signed: whether a wider register is filled with the sign.
    """

    function: Callable[..., np.ndarray]
    sources: tuple[int, ...]
    result: int
    signed: bool = False


def bits_of(kind: str) -> int:
    """32 for `f32`."""
    return 1 if kind == "pred" else 32 if kind.endswith("x2") else int(kind.lstrip("bsuf"))


def _pairwise(single: Operation) -> Operation:
    """An operation on float32 as one on two of them in 64 bits, each by itself."""

    def apply(*operands: np.ndarray) -> np.ndarray:
        wide = np.broadcast_arrays(*operands)
        found = single.function(*(np.ascontiguousarray(a).view(np.uint32) for a in wide))
        return found.view(np.uint64)

    return Operation(apply, (64,) * len(single.sources), 64)


def _mixed(opcode: Opcode, seed: int) -> Operation:
    """`add`, `sub` and `fma` of float32 with narrower first operands, which convert exactly."""
    single, widened = operation(opcode[:-1], seed), _WIDENED["f32", opcode[-1]]
    n = len(single.sources) - 1

    def apply(*operands: np.ndarray) -> np.ndarray:
        return single.function(*(widened(a) for a in operands[:n]), operands[n])

    return Operation(apply, (*[16] * n, 32), 32)


def _narrow(opcode: Opcode) -> Operation:
    """`add`, `sub` and `mul` of bfloat16: float32 has bits enough that rounding twice is once."""
    _modifiers(opcode, "rn")
    single = _typed("f32", {"add": np.add, "sub": np.subtract, "mul": np.multiply}[opcode[0]])

    def apply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return ar.to_bfloat16(single(ar.from_bfloat16(a), ar.from_bfloat16(b)))

    return Operation(apply, (16, 16), 16)


def operation(opcode: Opcode, seed: int) -> Operation:
    """The meaning of an opcode; `seed` says which device it is where the ISA leaves it open.

    Raises:
        UnknownInstruction: It has none here.
    """
    if opcode[-1] == "f32x2" and opcode[0] in ("add", "sub", "mul", "fma"):
        return _pairwise(operation((*opcode[:-1], "f32"), seed))
    if opcode[-2:] in (("f32", "bf16"), ("f32", "f16")) and opcode[0] in ("add", "sub", "fma"):
        return _mixed(opcode, seed)
    if opcode[0] not in _BUILDERS:
        raise UnknownInstruction(".".join(opcode))
    try:
        return _BUILDERS[opcode[0]](opcode, seed)
    except (KeyError, ValueError) as error:
        raise UnknownInstruction(".".join(opcode)) from error


def _modifiers(opcode: Opcode, allowed: str, types: int = 1) -> set[str]:
    """Those between name and types, which all must be allowed."""
    found = set(opcode[1 : len(opcode) - types])
    if found - set(allowed.split()):
        raise ValueError(opcode)
    return found


def _is_real(kind: str) -> bool:
    return kind in ("f16", "f32", "f64")


def _typed(kind: str, function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A function of values as one of bits."""
    view, back = KINDS[kind], UNSIGNED[bits_of(kind)]
    if kind == "f32":
        return lambda *operands: ar.raw(
            ar.canonical(function(*(bits.view(np.float32) for bits in operands)))
        )

    def apply(*operands: np.ndarray) -> np.ndarray:
        return function(*(bits.view(view) for bits in operands)).view(back)

    return apply


def _flushing(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def apply(*operands: np.ndarray) -> np.ndarray:
        return ar.flushed(function(*(ar.flushed(bits) for bits in operands)))

    return apply


def _same(n: int, kind: str, function: Callable[..., np.ndarray]) -> Operation:
    bits = bits_of(kind)
    return Operation(function, (bits,) * n, bits, kind.startswith("s"))


def _arithmetic(opcode: Opcode, _: int) -> Operation:
    """`add`, `sub`, and `mul` of floats."""
    name, kind = opcode[0], opcode[-1]
    if kind == "bf16":
        return _narrow(opcode)
    function = _typed(kind, {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name])
    if _is_real(kind):
        found = _modifiers(opcode, "rn ftz" if kind == "f32" else "rn")
        return _same(2, kind, _flushing(function) if "ftz" in found else function)
    if name == "mul":
        return _product(opcode)
    _modifiers(opcode, "")
    return _same(2, kind, function)


def _product(opcode: Opcode) -> Operation:
    kind = opcode[-1]
    (part,) = _modifiers(opcode, "lo hi wide")
    if part == "wide":
        wide = {16: np.int32, 32: np.int64} if kind[0] == "s" else {16: np.uint32, 32: np.uint64}
        bits, view = bits_of(kind), KINDS[kind]
        to, back = wide[bits], UNSIGNED[2 * bits]

        def widened(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return (a.view(view).astype(to) * b.view(view).astype(to)).view(back)

        return Operation(widened, (bits, bits), 2 * bits, kind[0] == "s")
    return _same(2, kind, _typed(kind, np.multiply if part == "lo" else ar.high_product))


def _multiply_add(opcode: Opcode, _: int) -> Operation:
    """`fma.rn`, and `mad` of integers."""
    kind = opcode[-1]
    if opcode[0] == "fma" or _is_real(kind):
        found = _modifiers(opcode, "rn ftz")
        if kind != "f32" or "rn" not in found:
            raise ValueError(opcode)
        return _same(3, kind, _flushing(ar.fma32) if "ftz" in found else ar.fma32)
    product = _product(opcode)

    def apply(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return product.function(a, b) + c

    return Operation(apply, (*product.sources, product.result), product.result, product.signed)


def _division(opcode: Opcode, seed: int) -> Operation:
    kind = opcode[-1]
    if not _is_real(kind):
        _modifiers(opcode, "")
        function = {"div": ar.quotient, "rem": ar.remainder}[opcode[0]]
        return _same(2, kind, _typed(kind, function))
    found = _modifiers(opcode, "rn full approx ftz")
    if "rn" in found:
        function = _typed(kind, np.divide)
        return _same(2, kind, _flushing(function) if "ftz" in found else function)
    if kind != "f32" or len(found & {"full", "approx"}) != 1:
        raise ValueError(opcode)
    name = "full" if "full" in found else "div"
    return _same(2, kind, ar.approximate(name, seed, ftz="ftz" in found))


def _root_or_reciprocal(opcode: Opcode, seed: int) -> Operation:
    """`sqrt`, `rcp`, exact with `.rn`; `rsqrt`, `ex2`, `lg2`, `sin`, `cos`, `tanh`."""
    name, kind = opcode[0], opcode[-1]
    found = _modifiers(opcode, "rn ftz" if "rn" in opcode else "approx ftz")
    if kind == "f64" and found == {"rn"} and name in _ROUNDED:
        return _same(1, kind, _typed(kind, _ROUNDED[name]))
    if name == "tanh" and "ftz" in found:
        raise ValueError(opcode)
    if kind != "f32" or not found & {"rn", "approx"} or ("rn" in found and name not in _ROUNDED):
        raise ValueError(opcode)
    if "approx" in found:
        return _same(1, kind, ar.approximate(name, seed, ftz="ftz" in found))
    function = _typed(kind, _ROUNDED[name])
    return _same(1, kind, _flushing(function) if "ftz" in found else function)


_ROUNDED: dict[str, Callable] = {"sqrt": np.sqrt, "rcp": lambda x: x.dtype.type(1) / x}


def _extreme(opcode: Opcode, _: int) -> Operation:
    """`min` and `max`."""
    name, kind = opcode[0], opcode[-1]
    if not _is_real(kind):
        _modifiers(opcode, "")
        return _same(2, kind, _typed(kind, {"min": np.minimum, "max": np.maximum}[name]))
    found = _modifiers(opcode, "ftz NaN")
    if kind != "f32":
        raise ValueError(opcode)
    function = {"min": ar.smaller, "max": ar.larger}[name]
    function = ar.propagating(function) if "NaN" in found else function
    return _same(2, kind, _flushing(function) if "ftz" in found else function)


def _sign(opcode: Opcode, _: int) -> Operation:
    """`neg` and `abs`."""
    name, kind = opcode[0], opcode[-1]
    found = _modifiers(opcode, "ftz" if _is_real(kind) else "")
    if not _is_real(kind):
        return _same(1, kind, _typed(kind, {"neg": np.negative, "abs": np.abs}[name]))
    unsigned = UNSIGNED[bits_of(kind)]
    top = unsigned(1 << (bits_of(kind) - 1))

    def apply(a: np.ndarray) -> np.ndarray:
        return a ^ top if name == "neg" else a & ~top

    return _same(1, kind, _flushing(apply) if "ftz" in found else apply)


def _logic(opcode: Opcode, _: int) -> Operation:
    _modifiers(opcode, "")
    name, kind = opcode[0], opcode[-1]
    functions: dict[str, Callable] = {
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.bitwise_not,
    }  # fmt: skip
    return _same(1 if name == "not" else 2, kind, functions[name])


def _shift(opcode: Opcode, _: int) -> Operation:
    """`shl` and `shr`: all bits are out where the number is too large."""
    _modifiers(opcode, "")
    name, kind = opcode[0], opcode[-1]
    bits, view = bits_of(kind), KINDS[kind]

    def apply(a: np.ndarray, by: np.ndarray) -> np.ndarray:
        values = a.view(view)
        amount = np.minimum(by, np.uint32(bits - 1)).astype(view)
        moved = values << amount if name == "shl" else values >> amount
        if kind[0] == "s" and name == "shr":
            return moved.view(a.dtype)
        return np.where(by < bits, moved.view(a.dtype), a.dtype.type(0))

    return Operation(apply, (bits, 32), bits, kind[0] == "s")


def _field(opcode: Opcode, _: int) -> Operation:
    """`bfe`: bits from a place on; signed ones are filled with the last that there is."""
    _modifiers(opcode, "")
    kind = opcode[-1]
    if kind not in ("u32", "s32"):
        raise ValueError(opcode)

    def apply(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        start, length = (v.astype(np.int64) & 255 for v in (start, length))
        field = a.astype(np.int64) >> np.minimum(start, 32)
        ones = (np.int64(1) << np.minimum(length, 32)) - 1
        found = field & ones
        if kind == "s32":
            last = a.astype(np.int64) >> np.clip(start + length - 1, 0, 31) & 1
            there = (np.int64(1) << np.clip(32 - start, 0, 32)) - 1  # bits that the operand has
            found = np.where(last * length != 0, found & there | ~(ones & there), found)
        return found.astype(np.uint32)

    return Operation(apply, (32, 32, 32), 32, kind == "s32")


def _set_predicate(opcode: Opcode, _: int) -> Operation:
    """`setp`, also with a further predicate: `setp.lt.and.s32`."""
    kind, name, rest = opcode[-1], opcode[1], opcode[2:-1]
    joins: dict[str, Callable] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    if set(rest) - {"ftz", *joins}:
        raise ValueError(opcode)
    found = ar.compare(name, KINDS[kind])
    function = found
    if "ftz" in rest:

        def function(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return found(ar.flushed(a), ar.flushed(b))

    bits, join = bits_of(kind), next((joins[r] for r in rest if r in joins), None)
    if join is None:
        return Operation(function, (bits, bits), 1)
    return Operation(lambda a, b, c: join(function(a, b), c), (bits, bits, 1), 1)


def _select(opcode: Opcode, _: int) -> Operation:
    _modifiers(opcode, "")
    bits = bits_of(opcode[-1])
    return Operation(lambda a, b, p: np.where(p, a, b), (bits, bits, 1), bits)


def _move(opcode: Opcode, _: int) -> Operation:
    _modifiers(opcode, "")
    return _same(1, opcode[-1], lambda a: a)


_WHOLE: dict[str, Callable] = {"rni": np.rint, "rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc}
_NARROWED: dict[Opcode, Callable[..., np.ndarray]] = {
    ("bf16", "f32"): ar.to_bfloat16,
    ("f16", "f32"): ar.to_float16,
    ("f32", "f64"): lambda a: ar.raw(a.view(np.float64).astype(np.float32)),
}
_WIDENED: dict[Opcode, Callable[..., np.ndarray]] = {
    ("f32", "bf16"): ar.from_bfloat16,
    ("f32", "f16"): lambda a: ar.raw(a.view(np.float16).astype(np.float32)),
    ("f64", "f32"): lambda a: ar.raw(a.view(np.float32).astype(np.float64)),
}


def _convert(opcode: Opcode, _: int) -> Operation:
    to, of = types = opcode[-2:]
    found = _modifiers(opcode, "rn rni rmi rpi rzi ftz", types=2)
    sources = (32 if of == "f32" else 16 if of == "bf16" else bits_of(of),)
    function: Callable[..., np.ndarray]
    if types in _WIDENED and not found:
        function = _WIDENED[types]
    elif types in _NARROWED and found == {"rn"}:
        function = _NARROWED[types]
    elif to in ("bf16x2", "f16x2") and of == "f32" and found == {"rn"}:
        half = {"bf16x2": ar.to_bfloat16, "f16x2": ar.to_float16}[to]
        sources = (32, 32)

        def function(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
            return half(upper).astype(np.uint32) << np.uint32(16) | half(lower)

    elif of == "f32" and (whole := found & set(_WHOLE)):
        function = _to_whole(to, _WHOLE[whole.pop()], "ftz" in found)
    elif to in ("f32", "f64") and not _is_real(of) and found == {"rn"}:
        view, real = KINDS[of], KINDS[to]

        def function(a: np.ndarray) -> np.ndarray:
            return ar.raw(a.view(view).astype(real))

    elif not _is_real(to) and not _is_real(of) and "bf" not in to + of and not found:
        view, wide, back = KINDS[of], KINDS[to], UNSIGNED[bits_of(to)]

        def function(a: np.ndarray) -> np.ndarray:
            return a.view(view).astype(wide).view(back)

    else:
        raise ValueError(opcode)
    return Operation(function, sources, 16 if to == "bf16" else bits_of(to), to[0] == "s")


def _to_whole(to: str, whole: Callable, ftz: bool) -> Callable[[np.ndarray], np.ndarray]:
    """float32 to a whole number, as float32 or as an integer."""

    def apply(a: np.ndarray) -> np.ndarray:
        values = whole((ar.flushed(a) if ftz else a).view(np.float32))
        if to == "f32":
            return ar.raw(values)
        return ar.to_integer(values, KINDS[to]).view(UNSIGNED[bits_of(to)])

    return apply


_BUILDERS: dict[str, Callable[[Opcode, int], Operation]] = {
    **dict.fromkeys(("add", "sub", "mul"), _arithmetic),
    **dict.fromkeys(("fma", "mad"), _multiply_add),
    **dict.fromkeys(("div", "rem"), _division),
    **dict.fromkeys(("sqrt", "rcp"), _root_or_reciprocal),
    **dict.fromkeys(("rsqrt", "ex2", "lg2", "sin", "cos", "tanh"), _root_or_reciprocal),
    **dict.fromkeys(("min", "max"), _extreme),
    **dict.fromkeys(("neg", "abs"), _sign),
    **dict.fromkeys(("and", "or", "xor", "not"), _logic),
    **dict.fromkeys(("shl", "shr"), _shift),
    "bfe": _field,
    "setp": _set_predicate,
    "selp": _select,
    "mov": _move,
    "cvt": _convert,
}  # fmt: skip
