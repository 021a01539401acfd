"""What the instructions compute, on arrays of raw bits, by NVIDIA's PTX ISA.

Registers are arrays of unsigned integers of their width, one element a lane; predicates are bool.
Where the ISA gives a result exactly, so does this; where it gives a bound (`ex2.approx`), the exact
result is moved within the bound by a hash of the input, as a device would: at random, and the same
each time.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

B16, B32, B64 = np.uint16, np.uint32, np.uint64
F16, F32, F64 = np.float16, np.float32, np.float64
Bits = np.ndarray
NAN32 = B32(0x7FFFFFFF)  # what arithmetic gives for NaN


def raw(values: np.ndarray) -> Bits:
    """Floats as the bits of a register."""
    return values.view({2: B16, 4: B32, 8: B64}[values.itemsize])


def canonical(values: np.ndarray) -> np.ndarray:
    """float32 with every NaN as arithmetic gives it; the host would keep an operand's bits."""
    if np.isnan(np.dot(values, values)):
        return np.where(np.isnan(values), NAN32.view(F32), values)
    return values


def flushed(bits: Bits) -> Bits:
    """`.ftz`: subnormal float32 become zeros of their sign."""
    return np.where(bits & B32(0x7F800000), bits, bits & B32(0x80000000))


def fma32(a: Bits, b: Bits, c: Bits) -> Bits:
    """`a b + c` rounded once to float32."""
    product = a.view(F32).astype(F64) * b.view(F32)  # exact: 48 bits
    addend = c.view(F32).astype(F64)
    total = product + addend
    result = total.astype(F32)
    # Rounding float64 again goes wrong where it lies half-way, or where the result has fewer bits.
    halfway = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    short = (raw(result) & B32(0x7F800000) == 0) & (total != 0)
    if halfway.any() or short.any():
        result = _to_odd(product, addend, total).astype(F32)
    return raw(canonical(result))


def _to_odd(product: np.ndarray, addend: np.ndarray, total: np.ndarray) -> np.ndarray:
    """The sum rounded to odd in float64: rounded again to 24 bits it is rounded once."""
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = np.ascontiguousarray(total).view(np.int64)
    move = (error != 0) & np.isfinite(error) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)
    return np.where(move, bits + np.where(away, 1, -1), bits).view(F64)


def contracted(sign_product: int, sign_addend: int) -> Callable[[Bits, Bits, Bits], Bits]:
    """`± a b ± c` rounded once: what a `mul` and an `add` without `.rn` may be made into."""

    def apply(a: Bits, b: Bits, c: Bits) -> Bits:
        a = a if sign_product > 0 else a ^ B32(0x80000000)
        return fma32(a, b, c if sign_addend > 0 else c ^ B32(0x80000000))

    return apply


def smaller(a: Bits, b: Bits) -> Bits:
    """`min.f32`: the other operand where one is NaN; -0 below +0."""
    x, y = a.view(F32), b.view(F32)
    return _nan_if_both(np.where(x == y, a | b, raw(np.fmin(x, y))), x, y)


def larger(a: Bits, b: Bits) -> Bits:
    """`max.f32`: the other operand where one is NaN; +0 above -0."""
    x, y = a.view(F32), b.view(F32)
    return _nan_if_both(np.where(x == y, a & b, raw(np.fmax(x, y))), x, y)


def _nan_if_both(bits: Bits, x: np.ndarray, y: np.ndarray) -> Bits:
    return np.where(np.isnan(x) & np.isnan(y), NAN32, bits)


def propagating(function: Callable[[Bits, Bits], Bits]) -> Callable[[Bits, Bits], Bits]:
    """`.NaN`: NaN where either operand is."""

    def apply(a: Bits, b: Bits) -> Bits:
        return np.where(np.isnan(a.view(F32)) | np.isnan(b.view(F32)), NAN32, function(a, b))

    return apply


def compare(name: str, kind: type) -> Callable[[Bits, Bits], np.ndarray]:
    """`setp`: ordered comparisons are false for NaN, those that end in `u` true."""
    signs = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
    functions = {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
        "gt": np.greater, "ge": np.greater_equal,
    }  # fmt: skip
    name = signs.get(name, name)
    real = issubclass(kind, np.floating)
    if name in ("num", "nan"):

        def either(a: Bits, b: Bits) -> np.ndarray:
            found = np.isnan(a.view(kind)) | np.isnan(b.view(kind))
            return found if name == "nan" else ~found

        return either
    unordered = real and name.endswith("u")
    function = functions[name[:2]]

    def apply(a: Bits, b: Bits) -> np.ndarray:
        x, y = a.view(kind), b.view(kind)
        found = function(x, y)
        if real and (unordered or name == "ne"):
            nan = np.isnan(x) | np.isnan(y)
            return found | nan if unordered else found & ~nan
        return found

    return apply


# PTX ISA 9.1, 9.7.3: div (.8), rcp (.13), sqrt (.15), rsqrt (.16), sin (.18), cos (.19), lg2 (.20),
# ex2 (.21), tanh (.22). "ex2" is bounded from the correctly rounded result, the others from the
# exact one. "lg2" errs absolutely between 1/2 and 2, "sin" and "cos" by `_angle_error`.
ULPS = {"ex2": 2.0, "rcp": 1.0, "div": 2.0, "full": 2.0}
RELATIVE = {"lg2": 2.0**-22, "sqrt": 2.0**-23, "rsqrt": 2.0**-22.9, "tanh": 2.0**-11}
EXACT: dict[str, Callable[..., np.ndarray]] = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": lambda x: 1 / x, "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x), "div": np.divide, "full": np.divide, "sin": np.sin,
    "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip


def units(exact: np.ndarray) -> np.ndarray:
    """The distance of neighboring float32 where each exact value lies."""
    _, exponent = np.frexp(np.where(np.isfinite(exact), exact, 1.0))
    return np.ldexp(1.0, np.maximum(exponent, -125) - 24)


def _angle_error(angle: np.ndarray) -> np.ndarray:
    """Of `sin` and `cos`, absolute; outside of 100 pi nothing is promised but an effort."""
    far = np.where(np.abs(angle) <= 100 * np.pi, 2.0**-14.7, 1.0)
    return np.where(np.abs(angle) <= 2 * np.pi, 2.0**-20.5, far)


def largest_error(name: str, exact: np.ndarray, operand: np.ndarray) -> np.ndarray:
    """How far an approximate result may lie from the exact one, by the ISA."""
    if name in ULPS:
        return (ULPS[name] + (0.5 if name == "ex2" else 0.0)) * units(exact)
    if name in ("sin", "cos"):
        return _angle_error(operand)
    bound = np.abs(exact) * RELATIVE[name]
    return np.where((operand > 0.5) & (operand < 2), 2.0**-22, bound) if name == "lg2" else bound


def approximate(name: str, seed: int, *, ftz: bool) -> Callable[..., Bits]:
    """An `.approx` instruction, or `div.full`, as one device might have it; `seed` says which."""
    function = EXACT[name]

    def apply(*operands: Bits) -> Bits:
        given = [flushed(bits) if ftz else bits for bits in operands]
        values = [bits.view(F32).astype(F64) for bits in given]
        exact = function(*values)
        if name == "div":  # a reciprocal beyond float32's range comes out as zero
            exact = np.where(
                np.abs(values[1]) > 2.0**126, values[0] * 0.0 * np.sign(values[1]), exact
            )
        key = given[0] if len(given) == 1 else given[0] ^ (given[1] * B32(0x9E3779B9))
        # Rounding takes half a unit of what is allowed.
        room = np.maximum(largest_error(name, exact, values[0]) - 0.5 * units(exact), 0.0)
        moved = exact + np.where(np.isfinite(exact), room, 0.0) * _unit(key, seed)
        special = (exact == 0) | ~np.isfinite(exact) | np.isinf(values[0])
        if name in _ONE_TO_ONE:
            special |= values[0] == _ONE_TO_ONE[name]
        bits = raw(canonical(np.where(special, exact, moved).astype(F32)))
        return flushed(bits) if ftz else bits

    return apply


_ONE_TO_ONE = {"ex2": 0.0, "lg2": 1.0, "cos": 0.0}  # operands whose result the ISA's tables give


def _unit(key: Bits, seed: int) -> np.ndarray:
    """Numbers in [-1, 1), the same for the same bits."""
    x = key ^ B32(seed * 2654435761 & 0xFFFFFFFF)
    for factor, shift in ((0x85EBCA6B, 13), (0xC2B2AE35, 16)):
        x = (x ^ (x >> B32(16))) * B32(factor)
        x = x ^ (x >> B32(shift))
    return x.astype(F64) * 2.0**-31 - 1.0


def to_bfloat16(bits: Bits) -> Bits:
    """float32 to the nearest bfloat16, ties to even; NaN is 0x7fff."""
    rounded = (bits + B32(0x7FFF) + ((bits >> B32(16)) & B32(1))) >> B32(16)
    return np.where(np.isnan(bits.view(F32)), B32(0x7FFF), rounded).astype(B16)


def to_float16(bits: Bits) -> Bits:
    """float32 to the nearest float16, ties to even; NaN is 0x7fff."""
    values = bits.view(F32)
    return np.where(np.isnan(values), B16(0x7FFF), raw(values.astype(F16)))


def from_bfloat16(bits: Bits) -> Bits:
    """bfloat16 to float32."""
    return bits.astype(B32) << B32(16)


def to_integer(values: np.ndarray, kind: type) -> np.ndarray:
    """A whole float to the nearest integer of the kind; NaN is 0."""
    limits = np.iinfo(kind)
    wide = np.nan_to_num(values.astype(np.longdouble), nan=0.0, posinf=1e30, neginf=-1e30)
    return np.clip(wide, limits.min, limits.max).astype(kind)


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integer division towards zero; all ones where the divisor is zero."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return np.where(zero, a.dtype.type(np.iinfo(a.dtype).max), a // safe)
    down = a // safe
    inexact = (down * safe != a) & ((a < 0) != (safe < 0))
    return np.where(zero, a.dtype.type(-1), down + inexact)


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of that division."""
    return np.where(b == 0, a, a - quotient(a, b) * b)


def high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product, of 32-bit or 64-bit integers."""
    if a.itemsize == 4:
        wide = np.int64 if a.dtype.kind == "i" else B64
        return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)
    mask, half = B64(0xFFFFFFFF), B64(32)
    x, y = a.view(B64), b.view(B64)
    low = (x & mask) * (y & mask)
    one = (x >> half) * (y & mask) + (low >> half)
    two = (x & mask) * (y >> half) + (one & mask)
    high = (x >> half) * (y >> half) + (one >> half) + (two >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, B64(0)) - np.where(b < 0, x, B64(0))
    return high.view(a.dtype)
