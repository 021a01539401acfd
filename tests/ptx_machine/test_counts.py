"""Counts of executed instructions, bytes and bank conflicts, against numbers worked by hand."""

import numpy as np
import pytest

from tests.ptx_machine.counts import bank_conflicts, kind_of
from tests.ptx_machine.test_watches import COPY, THREADS, TICKET, arrays, execute

LANE = np.arange(32)
REQUESTS = {  # byte offsets of a warp's lanes, bytes of an access, passes too many
    "neighbors": (4 * LANE, 4, 0),
    "one word for all": (0 * LANE, 4, 0),
    "every second word": (8 * LANE, 4, 1),
    "a column of 32": (128 * LANE, 4, 31),
    "a column of 33": (132 * LANE, 4, 0),
    "halves of a word": (2 * LANE, 2, 0),
    "halves of every second word": (8 * (LANE // 2) + 2 * (LANE % 2), 2, 0),
    "pairs of words": (8 * LANE, 8, 0),
    "fours of words": (16 * LANE, 16, 0),
    "fours, every other": (32 * LANE, 16, 4),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_bank_conflicts_of_one_warp(name):
    offsets, size, extra = REQUESTS[name]
    assert bank_conflicts(offsets, size, 0 * LANE) == (1, extra)
    both = np.concatenate([4 * LANE, offsets]) if size == 4 else np.tile(offsets, 2)
    warps = np.repeat([3, 7], 32)
    assert bank_conflicts(both, size, warps) == (2, extra if size == 4 else 2 * extra)


def test_kinds():
    kinds = {
        "float": "add.f32 fma.rn.f32x2 setp.lt.f32 mul.ftz.f32 max.NaN.f32 neg.bf16 abs.f16",
        "integer": "add.s32 mad.lo.s32 and.b32 setp.lt.u32 shl.b64 bfe.u32 xor.pred",
        "special": "ex2.approx.f32 div.rn.f32 div.s32 sqrt.approx.ftz.f32",
        "memory": "ld.global.v4.b32 st.shared.b32 atom.global.gpu.acq_rel.add.u32",
        "exchange": "shfl.sync.bfly.b32 bar.sync", "control": "bra.uni ret bra",
        "convert": "cvt.rn.bf16x2.f32", "move": "mov.b64 selp.b32",
    }  # fmt: skip
    for kind, opcodes in kinds.items():
        for opcode in opcodes.split():
            assert kind_of(opcode) == kind, opcode


def test_a_copy_is_counted():
    machine = execute(COPY, *arrays())
    counts, n = machine.counts["kernel"], 2 * THREADS
    assert counts.moved == {("global", "ld", 4): 4 * n, ("global", "st", 4): 4 * n}
    assert counts.executed["st.global.b32"] == n and counts.by_kind()["memory"] == (2 + 3) * n
    assert counts.by_kind().total() == counts.executed.total() and counts.requests == 0


def test_what_a_predicate_forbids_moves_nothing():
    """One lane of each program's 64 draws the ticket; the last program alone reads the parts."""
    source, result = arrays(4)
    result[0] = 0
    counts = execute(TICKET.format(order="acq_rel"), source, result, programs=4).counts["kernel"]
    assert counts.moved["global", "atom", 4] == 4 * 4
    assert counts.moved["global", "ld", 4] == 4 * 4
    assert counts.moved["shared", "st", 4] == 4 * 4 and counts.moved["shared", "ld", 4] == 1024
    assert (counts.requests, counts.conflicts) == (4 + 8, 0)


def test_conflicts_of_a_kernel():
    """Threads 32 words apart would leave shared memory; lanes 4 words apart meet in four passes."""
    body = """
	shl.b32 	%r6, %r1, 4;
	add.s32 	%r6, %r6, %r5;
	st.shared.b32 	[%r6], %r3;
"""
    counts = execute(body, *arrays(), shared=1024).counts["kernel"]
    assert (counts.requests, counts.conflicts) == (4, 4 * 3)
