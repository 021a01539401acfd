"""Small programs in PTX, each with one fault, and the same without it."""

import struct

import numpy as np
import pytest

from tests.ptx_machine import (
    Machine,
    Misaligned,
    OrderMatters,
    OutOfBounds,
    Race,
    ReadOfUnwritten,
    UnknownInstruction,
    Unreached,
)
from tests.ptx_machine.memory import POISON, host_space

THREADS = 64
HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1,
	.param .u32 kernel_param_2
)
.reqntid 64
{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<19>;
	.reg .b64 	%rd<19>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	ld.param.b32 	%r9, [kernel_param_2];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	mad.lo.s32 	%r3, %r2, 64, %r1;  // the thread's number
	mad.wide.s32 	%rd3, %r3, 4, %rd1;
	mad.wide.s32 	%rd4, %r3, 4, %rd2;
	mul.wide.u32 	%rd5, %r2, 4;
	add.s64 	%rd6, %rd2, %rd5;  // the program's word
	setp.eq.s32 	%p1, %r1, 0;
	shl.b32 	%r4, %r1, 2;
	mov.b32 	%r5, global_smem;
	add.s32 	%r4, %r4, %r5;
"""


def execute(body, source, result, *, number=0, programs=2, seed=0, shared=256):
    """Runs a body on two arrays; `POISON` in them is memory nobody wrote."""
    spaces = [
        host_space(a.ctypes.data, a.nbytes, name)
        for a, name in ((source, "source"), (result, "result"))
    ]
    for space in spaces:
        space.poisoned = True
    given = [a.ctypes.data.to_bytes(8, "little") for a in (source, result)]
    text = HEAD + body + "\n\tret;\n}\n"
    machine = Machine(seed, schedules=3)
    numbers = [*given, struct.pack("<i", number)]
    machine.launch(text, (programs, 1, 1), THREADS, numbers, spaces, shared)
    return machine


def arrays(programs=2):
    source = np.arange(programs * THREADS, dtype=np.uint32)
    return source, np.full(programs * THREADS, POISON << 16 | POISON, np.uint32)


COPY = """
	ld.global.b32 	%r6, [%rd3];
	st.global.b32 	[%rd4], %r6;
"""


def test_a_copy():
    source, result = arrays()
    machine = execute(COPY, source, result)
    assert np.array_equal(source, result)
    assert machine.counts["kernel"].executed["ld.global.b32"] == 2 * THREADS


def test_predicates_loops_and_calls_of_unequal_length():
    """Thread t adds up its number t times; the even ones alone store it."""
    source, result = arrays()
    result[:] = 7
    body = """
	mov.b32 	%r6, 0;
	mov.b32 	%r7, 0;
$L__loop:
	setp.ge.s32 	%p2, %r7, %r1;
	@%p2 bra 	$L__done;
	add.s32 	%r6, %r6, %r3;
	add.s32 	%r7, %r7, 1;
	bra.uni 	$L__loop;
$L__done:
	and.b32 	%r8, %r1, 1;
	setp.eq.s32 	%p3, %r8, 1;
	@!%p3 st.global.b32 	[%rd4], %r6;
"""
    execute(body, source, result)
    thread = np.arange(len(source))
    expected = np.where(thread % 2 == 0, thread * (thread % THREADS), 7)
    assert np.array_equal(result, expected.astype(np.uint32))


@pytest.mark.parametrize(("offset", "where"), [(4, "past the end"), (-4, "before the start")])
def test_out_of_bounds(offset, where):
    source, result = arrays()
    body = COPY.replace("[%rd3]", f"[%rd3+{offset}]")
    with pytest.raises(OutOfBounds, match=r"kernel, line .*outside source of 512 bytes"):
        execute(body, source, result)


def test_out_of_bounds_of_shared_memory():
    body = "st.shared.b32 [%r4+4], %r1;"
    with pytest.raises(OutOfBounds, match="shared memory"):
        execute(body, *arrays())


def test_misaligned():
    body = "ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd1+8];"
    with pytest.raises(Misaligned, match="16 bytes at"):
        execute(body, *arrays())


def test_a_load_of_what_nobody_wrote():
    source, result = arrays()
    with pytest.raises(ReadOfUnwritten, match="result"):
        execute("ld.global.b32 %r6, [%rd4];", source, result)
    with pytest.raises(ReadOfUnwritten, match="shared"):
        execute("ld.shared.b32 %r6, [%r4];", source, result)


NEIGHBOR = """
	st.shared.b32 	[%r4], %r3;
	{barrier}
	xor.b32 	%r6, %r4, 252;  // the thread at the other end
	ld.shared.b32 	%r7, [%r6];
	{second}
	st.shared.b32 	[%r4], %r7;
	{barrier}
	ld.shared.b32 	%r8, [%r6];
	st.global.b32 	[%rd4], %r8;
"""


@pytest.mark.parametrize("seed", range(4))
def test_shared_memory_between_barriers(seed):
    source, result = arrays()
    barrier = "bar.sync 0;"
    execute(NEIGHBOR.format(barrier=barrier, second=barrier), source, result, seed=seed)
    assert np.array_equal(source, result)
    for first, second in (("", barrier), (barrier, "")):  # write then read, read then write
        fault = NEIGHBOR.format(barrier=first, second=second)
        with pytest.raises((Race, ReadOfUnwritten), match="shared"):
            execute(fault, source, result, seed=seed)


def test_a_barrier_that_half_of_a_program_does_not_reach():
    body = "setp.lt.s32 %p2, %r1, 32;\n@%p2 bra $L__end;\nbar.sync 0;\n$L__end:"
    with pytest.raises(Unreached, match="of 64 threads of program"):
        execute(body, *arrays())
    twice = body.replace("$L__end:", "bra.uni $L__out;\n$L__end:\nbar.sync 0;\n$L__out:")
    with pytest.raises(Unreached, match="at the barriers of lines"):
        execute(twice, *arrays())


def test_a_shuffle_among_lanes_that_are_not_there():
    body = "setp.lt.s32 %p2, %r1, 16;\n@%p2 bra $L__end;\n"
    body += "shfl.sync.bfly.b32 %r6, %r1, 1, 31, -1;\n$L__end:"
    with pytest.raises(Unreached, match="shfl"):
        execute(body, *arrays())


def test_a_shuffle_waits_for_lanes_that_went_another_way():
    source, result = arrays()
    body = """
	mov.b32 	%r6, %r3;
	setp.lt.s32 	%p2, %r1, 16;
	@%p2 bra 	$L__join;
	add.s32 	%r6, %r3, 0;
$L__join:
	shfl.sync.bfly.b32 	%r7, %r6, 31, 31, -1;
	st.global.b32 	[%rd4], %r7;
"""
    execute(body, source, result)
    assert np.array_equal(result, source ^ 31)


@pytest.mark.parametrize("mode", ["up", "down", "idx", "bfly"])
def test_shuffles(mode):
    source, result = arrays()
    by, clamp = 3, 0 if mode == "up" else 31
    execute(f"""
	shfl.sync.{mode}.b32 	%r6|%p2, %r3, {by}, {clamp}, -1;
	selp.b32 	%r7, %r6, 1000, %p2;
	st.global.b32 	[%rd4], %r7;
""", source, result)  # fmt: skip
    lane, base = source & 31, source & ~np.uint32(31)
    expected = {
        "up": np.where(lane >= 3, source - 3, 1000), "down": np.where(lane <= 28, source + 3, 1000),
        "idx": base + 3, "bfly": source ^ 3,
    }[mode]  # fmt: skip
    assert np.array_equal(result, expected)


def test_a_matrix_load():
    """Lane t gets the t-th word of each matrix, whose rows are of 16 bytes."""
    source, result = arrays()
    execute("""
	st.shared.b32 	[%r4], %r3;
	bar.sync 	0;
	and.b32 	%r6, %r1, 15;  // 256 bytes are 16 rows: two matrices
	shl.b32 	%r6, %r6, 4;
	add.s32 	%r6, %r6, %r5;
	ldmatrix.sync.aligned.m8n8.x2.shared.b16 	{%r7, %r8}, [%r6];
	setp.lt.s32 	%p2, %r1, 32;
	selp.b32 	%r7, %r7, %r8, %p2;
	st.global.b32 	[%rd4], %r7;
""", source, result)  # fmt: skip
    assert np.array_equal(source, result)


TICKET = """
	@%p1 st.global.b32 	[%rd6+16], %r3;  // a part
	bar.sync 	0;
	mov.b32 	%r6, 1;
	@%p1 atom.global.gpu.{order}.add.u32 	%r7, [%rd2], %r6;
	@%p1 st.shared.b32 	[global_smem], %r7;
	bar.sync 	0;
	ld.shared.b32 	%r7, [global_smem];
	setp.ne.s32 	%p2, %r7, 3;
	@%p2 bra 	$L__end;
	setp.lt.s32 	%p3, %r1, 4;
	shl.b32 	%r8, %r1, 2;
	cvt.u64.u32 	%rd7, %r8;
	add.s64 	%rd8, %rd2, %rd7;
	@%p3 ld.global.b32 	%r10, [%rd8+16];
	@%p3 st.global.b32 	[%rd8+32], %r10;
	mov.b32 	%r11, 0;
	@%p1 st.global.b32 	[%rd2], %r11;
$L__end:
"""


@pytest.mark.parametrize("seed", range(8))
def test_the_last_of_the_programs_reads_what_all_wrote(seed):
    source, result = arrays(4)
    result[0] = 0
    execute(TICKET.format(order="acq_rel"), source, result, programs=4, seed=seed)
    assert result[0] == 0 and result[4:8].tolist() == result[8:12].tolist() == [0, 64, 128, 192]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("order", ["relaxed", "acquire", "release"])
def test_a_weaker_ticket_is_a_race_in_every_schedule(order, seed):
    source, result = arrays(4)
    result[0] = 0
    with pytest.raises(Race, match="load of"):
        execute(TICKET.format(order=order), source, result, programs=4, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_a_ticket_drawn_before_all_have_stored_is_a_race(seed):
    """The part is stored by another warp than draws, and the barrier between them is gone."""
    source, result = arrays(4)
    result[0] = 0
    other = TICKET.replace(
        "@%p1 st.global.b32 	[%rd6+16]", "@%p4 st.global.b32 	[%rd6+16]", 1
    )
    other = "setp.eq.s32 %p4, %r1, 40;\n" + other.format(order="acq_rel")
    execute(other, source, result, programs=4, seed=seed)
    result[:] = POISON << 16 | POISON
    result[0] = 0
    with pytest.raises((Race, ReadOfUnwritten)):
        execute(other.replace("bar.sync 	0;", "", 1), source, result, programs=4, seed=seed)


def test_what_depends_on_the_order_of_programs():
    """Each program stores which number it drew: no race, but other bits in another order."""
    body = """
	mov.b32 	%r6, 1;
	@%p1 atom.global.gpu.acq_rel.add.u32 	%r7, [%rd2], %r6;
	@%p1 st.global.b32 	[%rd6+{at}], {what};
"""
    source, result = arrays(8)
    result[0] = 0
    execute(body.format(at=16, what="%r2"), source, result, programs=8)
    assert result[0] == 8 and result[4:12].tolist() == list(range(8))
    result[0] = 0
    with pytest.raises(OrderMatters, match="kernel: result, order 1"):
        execute(body.format(at=16, what="%r7"), source, result, programs=8)


def test_programs_that_write_one_place():
    body = "@%p1 st.global.b32 [%rd2], %r2;"
    with pytest.raises(Race, match="store to"):
        execute(body, *arrays())
    execute(body.replace("%r2;", "%r9;"), *arrays())  # the same number: no harm


@pytest.mark.parametrize(
    "line", ["frobnicate.b32 %r6, %r1;", "ld.local.b32 %r6, [%rd1];", "bar.sync 1;"]
)
def test_an_unknown_instruction_is_named(line):
    with pytest.raises(UnknownInstruction, match=line.split()[0].replace(".", r"\.")):
        execute(line, *arrays())
