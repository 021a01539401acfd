"""Instructions against exact arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.ptx_machine import UnknownInstruction
from tests.ptx_machine.instructions import operation

RNG = np.random.default_rng(0)
SPECIAL = np.array(
    [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0x00000001, 0x807FFFFF, 0x7F7FFFFF], np.uint32
)


def bits(n):
    """Any floats at all, the special ones among them."""
    return np.concatenate([SPECIAL, RNG.integers(0, 1 << 32, n, dtype=np.uint32)])


def near(n, spread=4):
    """Floats of similar size, so that sums cancel and halves occur."""
    values = RNG.integers(-(1 << 12), 1 << 12, n) * 2.0 ** RNG.integers(-spread, spread, n)
    return values.astype(np.float32).view(np.uint32)


def apply(opcode, *operands, seed=0):
    with np.errstate(all="ignore"):
        return operation(tuple(opcode.split(".")), seed).function(*operands)


def floats(found):
    return found.view(np.float32)


def rounded(exact):
    """A fraction to the nearest float32, ties to even, worked in whole numbers."""
    if exact == 0:
        return 0.0
    size = abs(exact)
    exponent = -149
    while size / Fraction(2) ** exponent >= 1 << 24:
        exponent += 1
    scaled = size / Fraction(2) ** exponent
    whole = scaled.numerator // scaled.denominator
    rest = scaled - whole
    whole += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1)
    return float(whole * Fraction(2) ** exponent) * (1 if exact > 0 else -1)


@pytest.mark.parametrize("scale", [0, -60, -74])
def test_fma_is_rounded_once(scale):
    """Also where the product lies half-way in float64, and where the result is subnormal."""
    n = 400
    a, b = near(n), near(n)
    floats(a)[:] *= np.float32(2.0**scale)
    floats(b)[:] *= np.float32(2.0**scale)
    c = (floats(a).astype(np.float64) * floats(b)).astype(np.float32)
    c = np.where(np.arange(n) % 2, -c, np.float32(2.0**40) * c).astype(np.float32)
    floats(a)[::5] += np.float32(2.0 ** (scale - 4))
    found = floats(apply("fma.rn.f32", a, b, c.view(np.uint32)))
    for x, y, z, r in zip(floats(a), floats(b), c, found, strict=True):
        assert r == rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))


def test_fma_where_rounding_twice_goes_wrong():
    """2^-70 below the middle of two floats: float64 lies upon it, and the tie would go up."""
    sign = np.array([1, -1], np.float32)
    a = sign * np.float32(2.0**-12 * (1 + 2.0**-23))
    b = np.array([2.0**-12 * (1 - 2.0**-23)], np.float32)
    c = sign * np.float32(1 + 2.0**-23)
    found = floats(apply("fma.rn.f32", *(v.view(np.uint32) for v in (a, b, c))))
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert found.tolist() == c.tolist() and (np.abs(twice) == np.float32(1 + 2.0**-22)).all()


@pytest.mark.parametrize("opcode", ["add.f32x2", "sub.rn.f32x2", "mul.f32x2", "fma.rn.f32x2"])
def test_two_floats_in_one_register(opcode):
    operands = [near(200) for _ in range(3 if "fma" in opcode else 2)]
    found = apply(opcode, *(v.view(np.uint64) for v in operands))
    assert np.array_equal(found.view(np.uint32), apply(opcode.removesuffix("x2"), *operands))
    one = apply(opcode, operands[0].view(np.uint64)[:1], *(v.view(np.uint64) for v in operands[1:]))
    assert len(one) == 100 and one[0] == found[0]


@pytest.mark.parametrize("name", ["min", "max"])
def test_extremes_drop_nan_unless_asked(name):
    nan, one = np.array([0x7FC00000], np.uint32), np.array([1.0], np.float32).view(np.uint32)
    for pair in ((nan, one), (one, nan)):
        assert floats(apply(f"{name}.f32", *pair)) == 1
        assert np.isnan(floats(apply(f"{name}.NaN.f32", *pair)))
    assert apply(f"{name}.f32", nan, nan)[0] == 0x7FFFFFFF
    zeros = np.array([0], np.uint32), np.array([1 << 31], np.uint32)
    assert apply(f"{name}.f32", *zeros)[0] == ((1 << 31) if name == "min" else 0)


@pytest.mark.parametrize("name", ["add", "sub", "fma"])
def test_a_narrow_operand_beside_a_float(name):
    narrow, wide = apply("cvt.rn.bf16.f32", near(200)), near(200)
    full = apply("cvt.f32.bf16", narrow)
    n = 2 if name == "fma" else 1
    found = apply(f"{name}.rn.f32.bf16", *[narrow] * n, wide)
    assert np.array_equal(found, apply(f"{name}.rn.f32", *[full] * n, wide))


@pytest.mark.parametrize("opcode", ["add.f32", "mul.f32", "div.rn.f32", "fma.rn.f32"])
def test_arithmetic_gives_one_nan(opcode):
    one = np.array([0x3F800000] * 3, np.uint32)
    nan = np.array([0x7F812345, 0xFFC00001, 0x3F800000], np.uint32)
    found = apply(opcode, *((nan, one, one) if "fma" in opcode else (nan, one)))
    assert found[:2].tolist() == [0x7FFFFFFF] * 2 and found[2] != 0x7FFFFFFF


def test_comparisons_with_nan():
    nan, one = np.array([0x7FC00000], np.uint32), np.array([0x3F800000], np.uint32)
    for name in ("eq", "ne", "lt", "le", "gt", "ge", "num"):
        assert not apply(f"setp.{name}.f32", nan, one)[0], name
        assert apply(f"setp.{name}.f32", one, one)[0] == (name in ("eq", "le", "ge", "num"))
    for name in ("equ", "neu", "ltu", "leu", "gtu", "geu", "nan"):
        assert apply(f"setp.{name}.f32", nan, one)[0], name


def test_narrow_floats_are_torchs():
    x = bits(4000)
    values = torch.from_numpy(x.view(np.float32).copy())
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        found = apply(f"cvt.rn.{kind}.f32", x)
        expected = values.to(dtype)
        mine = torch.from_numpy(found.view(np.int16).copy()).view(dtype)
        assert torch.equal(mine.isnan(), expected.isnan())
        assert torch.equal(mine[~mine.isnan()], expected[~expected.isnan()])
        back = floats(apply(f"cvt.f32.{kind}", found))
        assert np.array_equal(back, expected.float().numpy(), equal_nan=True)
    both = apply("cvt.rn.bf16x2.f32", x, x[::-1].copy())
    assert (both >> np.uint32(16) == apply("cvt.rn.bf16.f32", x)).all()


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_arithmetic_of_bfloat16_is_torchs(name):
    a, b = (RNG.integers(0, 1 << 16, 8000).astype(np.uint16) for _ in range(2))
    mine, x, y = (
        torch.from_numpy(v.view(np.int16)).view(torch.bfloat16)
        for v in (apply(f"{name}.rn.bf16", a, b), a, b)
    )
    expected = getattr(torch, name)(x, y)
    assert torch.equal(mine.isnan(), expected.isnan())
    assert torch.equal(mine[~mine.isnan()], expected[~expected.isnan()])


def test_roots_and_reciprocals_of_float64():
    x = RNG.uniform(0.1, 9, 500)
    for name, exact in (("sqrt", np.sqrt(x)), ("rcp", 1 / x)):
        found = apply(f"{name}.rn.f64", x.view(np.uint64)).view(np.float64)
        assert np.array_equal(found, exact)


def test_integers():
    a, b = bits(2000), bits(2000)[::-1].copy()
    for name in ("s32", "u32"):
        kind = np.int32 if name == "s32" else np.uint32
        x, y = (v.view(kind).astype(object) for v in (a, b))
        product = [int(p) * int(q) for p, q in zip(x, y, strict=True)]
        wide = apply(f"mul.wide.{name}", a, b)
        assert [int(w) for w in wide] == [p & (1 << 64) - 1 for p in product]
        assert (apply(f"mul.hi.{name}", a, b) == (wide >> np.uint64(32)).astype(np.uint32)).all()
        assert (apply(f"mul.lo.{name}", a, b) == wide.astype(np.uint32)).all()
        found = apply(f"div.{name}", a, b).view(kind)
        for p, q, r in zip(x, y, found, strict=True):
            if q != 0 and (p, q) != (-(1 << 31), -1):
                assert int(r) == abs(int(p)) // abs(int(q)) * (1 if (p < 0) == (q < 0) else -1)
    long = RNG.integers(0, 1 << 64, 500, dtype=np.uint64)
    turned = long[::-1].copy()
    for name, kind in (("s64", np.int64), ("u64", np.uint64)):
        found = apply(f"mul.hi.{name}", long, turned).view(kind)
        for p, q, r in zip(long.view(kind), turned.view(kind), found, strict=True):
            assert int(r) == int(p) * int(q) >> 64


def test_shifts_beyond_the_width():
    a, by = np.array([0x80000001] * 4, np.uint32), np.array([0, 31, 32, 200], np.uint32)
    assert apply("shl.b32", a, by).tolist() == [0x80000001, 1 << 31, 0, 0]
    assert apply("shr.u32", a, by).tolist() == [0x80000001, 1, 0, 0]
    assert apply("shr.s32", a, by).tolist() == [0x80000001, *[0xFFFFFFFF] * 3]


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_fields_by_the_isas_own_loop(kind):
    a = RNG.integers(0, 1 << 32, 3000, dtype=np.uint32)
    start, length = (RNG.integers(0, 40, 3000).astype(np.uint32) for _ in range(2))
    found = apply(f"bfe.{kind}", a, start, length)
    for value, at, size, result in zip(
        *(v.tolist() for v in (a, start, length, found)), strict=True
    ):
        sign = 0 if kind == "u32" or size == 0 else value >> min(at + size - 1, 31) & 1
        there = [value >> (at + k) & 1 if k < size and at + k <= 31 else sign for k in range(32)]
        assert result == sum(bit << k for k, bit in enumerate(there))


def test_floats_to_integers_are_clipped():
    x = np.array([2.5, -2.5, 3e9, -3e9, np.nan, np.inf], np.float32).view(np.uint32)
    found = apply("cvt.rzi.s32.f32", x).view(np.int32).tolist()
    assert found == [2, -2, 2**31 - 1, -(2**31), 0, 2**31 - 1]
    assert floats(apply("cvt.rmi.ftz.f32.f32", x))[:2].tolist() == [2, -3]


def unit(values):
    """Of float32 in the last place, for normal numbers."""
    return 2.0 ** (np.floor(np.log2(np.abs(values))) - 23)


APPROXIMATIONS = {  # operands, exact result, largest error as the PTX ISA 9.1 words it
    "ex2.approx.f32": ((-9, 9), np.exp2, lambda x, y: 2.5 * unit(y)),
    "ex2.approx.ftz.f32": ((-120, 120), np.exp2, lambda x, y: 2.5 * unit(y)),
    "rcp.approx.ftz.f32": ((2, 40), lambda x: 1 / x, lambda x, y: unit(y)),
    "sqrt.approx.f32": ((2, 40), np.sqrt, lambda x, y: 2.0**-23 * y),
    "rsqrt.approx.f32": ((2, 40), lambda x: x**-0.5, lambda x, y: 2.0**-22.9 * y),
    "lg2.approx.f32": ((2, 40), np.log2, lambda x, y: 2.0**-22 * y),
    "lg2.approx.ftz.f32": ((0.6, 1.9), np.log2, lambda x, y: 2.0**-22 + 0 * y),
    "sin.approx.f32": ((-6, 6), np.sin, lambda x, y: 2.0**-20.5 + 0 * y),
    "cos.approx.ftz.f32": ((-300, -7), np.cos, lambda x, y: 2.0**-14.7 + 0 * y),
    "tanh.approx.f32": ((-3, 3), np.tanh, lambda x, y: 2.0**-11 * np.abs(y)),
}


@pytest.mark.parametrize("opcode", APPROXIMATIONS)
def test_approximations_err_within_their_bounds_and_the_same_each_time(opcode):
    """Nearly all of what is allowed is used: results of a device cannot be worse."""
    (low, high), exact, bound = APPROXIMATIONS[opcode]
    x = RNG.uniform(low, high, 5000).astype(np.float32)
    found = [floats(apply(opcode, x.view(np.uint32), seed=s)) for s in (1, 1, 2)]
    truth = exact(x.astype(np.float64))
    share = np.abs(found[0] - truth) / bound(x, truth)
    assert 0.85 < share.max() <= 1
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


@pytest.mark.parametrize("opcode", ["div.full.f32", "div.approx.ftz.f32"])
def test_approximate_quotients(opcode):
    a, b = (RNG.uniform(1, 40, 5000).astype(np.float32) for _ in range(2))
    truth = a.astype(np.float64) / b
    share = np.abs(floats(apply(opcode, a.view(np.uint32), b.view(np.uint32))) - truth)
    assert 0.85 < (share / (2 * unit(truth))).max() <= 1
    a = np.array([-(2.0**127), np.inf], np.float32).view(np.uint32)
    b = np.array([2.0**127] * 2, np.float32).view(np.uint32)
    found = floats(apply(opcode, a, b))
    if "full" in opcode:
        assert abs(found[0] + 1) < 2.0**-21 and found[1] == np.inf
    else:
        assert found[0] == 0 and np.signbit(found[0]) and np.isnan(found[1])


def test_corners_of_approximations():
    """The ISA's tables: what they give is exact."""
    inf, nan = np.inf, np.nan
    tables = {
        "ex2": [(-inf, 0.0), (-0.0, 1.0), (0.0, 1.0), (inf, inf)],
        "lg2": [(-inf, nan), (-2.0, nan), (-0.0, -inf), (0.0, -inf), (1.0, 0.0), (inf, inf)],
        "rcp": [(-inf, -0.0), (-0.0, -inf), (0.0, inf), (inf, 0.0)],
        "sqrt": [(-inf, nan), (-2.0, nan), (-0.0, -0.0), (0.0, 0.0), (inf, inf)],
        "rsqrt": [(-inf, nan), (-2.0, nan), (-0.0, -inf), (0.0, inf), (inf, 0.0)],
        "sin": [(-inf, nan), (-0.0, -0.0), (0.0, 0.0), (inf, nan)],
        "cos": [(-inf, nan), (-0.0, 1.0), (0.0, 1.0), (inf, nan)],
        "tanh": [(-inf, -1.0), (-0.0, -0.0), (0.0, 0.0), (inf, 1.0)],
    }
    for name, table in tables.items():
        for operand, result in [*table, (nan, nan)]:
            given = np.array([operand], np.float32).view(np.uint32)
            found = floats(apply(f"{name}.approx.f32", given))
            assert np.array_equal(found, [result], equal_nan=True), (name, operand, found)
            assert result != 0 or np.signbit(found[0]) == np.signbit(result), (name, operand)


def test_ftz_flushes_operands_and_results():
    tiny = np.array([1, 0x80000001], np.uint32)
    one = np.array([0x3F800000], np.uint32)
    assert apply("mul.ftz.f32", tiny, one).tolist() == [0, 1 << 31]
    assert apply("mul.f32", tiny, one).tolist() == tiny.tolist()
    small = np.array([0x00800000], np.uint32)  # the least normal number
    half = np.array([0x3F000000], np.uint32)
    assert apply("mul.ftz.f32", small, half)[0] == 0


@pytest.mark.parametrize(
    "opcode", ["add.rz.f32", "fma.rn.relu.f16", "frobnicate.b32", "cvt.rz.bf16.f32", "mul.s32"]
)
def test_what_is_not_known_is_named(opcode):
    with pytest.raises(UnknownInstruction, match=opcode.replace(".", r"\.")):
        operation(tuple(opcode.split(".")), 0)
