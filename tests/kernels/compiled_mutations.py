"""Faults put into the text of compiled kernels, each of which is found; run by test_compiled.py.

An edit changes the PTX that the compiler wrote, and the call that passes without it must fail: by a
watch of the machine, or by a result outside the kernel tests' budget.
"""

import re

import pytest
import torch

from fastpo_kernels.testing import pair_inputs
from tests.kernels.objectives import CASES, check, run

SCHEDULES = 2
FORWARD, BACKWARD = "pair_loss_fwd_kernel", "pair_loss_bwd_kernel"
# The last barrier, by its place from the end: it follows the ticket's, which every thread has read.
UNNEEDED = [-1]


def inputs(dims=(7, 31), dtype=torch.float32):
    return pair_inputs(3, dims, dtype, n_annotators=2)


def verdict(x, name="dpo"):
    """How the call fails; empty if it passes."""
    try:
        check(CASES[name], x)
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return ""


def editing(hook, kernel, change):
    """Changes one kernel's text, and says how often."""
    done = []

    def edit(name, text):
        if name != kernel:
            return text
        changed = change(text)
        done.append(changed != text)
        return changed

    hook.edit = edit
    return done


def replaced(pattern, by, *, which=None):
    """A change of all places that match, or of one."""

    def change(text):
        if which is None:
            return re.sub(pattern, by, text)
        found = list(re.finditer(pattern, text))
        at = found[which]
        return text[: at.start()] + at.expand(by) + text[at.end() :]

    return change


EDITS = {
    "a ticket that orders nothing": (FORWARD, replaced(r"\.acq_rel", ".relaxed"), "Race|load of"),
    "a ticket without a release": (FORWARD, replaced(r"\.acq_rel", ".acquire"), "load of"),
    "a ticket without an acquire": (FORWARD, replaced(r"\.acq_rel", ".release"), "load of"),
    "a ticket seen by its program only": (
        FORWARD, replaced(r"atom\.global\.gpu", "atom.global.cta"), "atomic on|load of",
    ),
    "a partial not stored": (
        FORWARD, replaced(r"@%p\d+ st\.global\.b32.*;", "", which=0), "nothing was stored",
    ),
    "the forward mask wider by one": (
        FORWARD, replaced(r"setp\.lt\.s32", "setp.le.s32"), "outside|over its budget",
    ),
    "the gradient's mask wider by one": (
        BACKWARD, replaced(r"setp\.lt\.s32", "setp.le.s32"), "outside|store to",
    ),
    "too many lanes in the sum of the warps": (
        FORWARD, replaced(r"(setp\.lt\.u32\s+%p\d+, %r\d+, )\d+;", r"\g<1>40;", which=0),
        "shared",
    ),
    "a shuffle to the wrong lane": (
        FORWARD, replaced(r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, )16", r"\g<1>8"), "budget",
    ),
    "a shuffle that half the warp has left": (
        FORWARD, lambda text: _leaving(text), "wait for the others",
    ),
    "a product rounded to nothing": (
        BACKWARD, replaced(r"mul\.f32(\s+%r\d+, %r\d+, )%r\d+;", r"mul.f32\g<1>0f00000000;"),
        "budget",
    ),
}  # fmt: skip


def _leaving(text):
    """Upper half-warps end before the first shuffle."""
    at = text.index("shfl.sync")
    line = text.rindex("\n", 0, at) + 1
    lane = re.search(r"and\.b32\s+(%r\d+), %r\d+, 31;", text)
    assert lane
    leave = f"setp.gt.u32 %p900, {lane[1]}, 15;\n@%p900 bra $L__left;\n"
    text = text[:line] + leave + text[line:]
    text = re.sub(r"\.reg \.pred(\s+)%p<\d+>;", r".reg .pred\1%p<999>;", text)
    return text.replace("ret;", "$L__left:\nret;")


@pytest.mark.parametrize("fault", EDITS)
def test_a_fault_is_found(fault, hook, small_tiles):
    kernel, change, sign = EDITS[fault]
    x = inputs()
    assert verdict(x) == ""
    done = editing(hook, kernel, change)
    found = verdict(x)
    assert any(done), "the edit found nothing to change"
    assert re.search(sign, found), found or "the fault was not found"


def test_the_ticket_not_set_back(hook, small_tiles):
    """Its store is the one to the atomic's own address."""

    def change(text):
        ticket = re.search(r"atom\.global.*?(\[ %rd\d+ \+ 0 \])", text)
        assert ticket
        return re.sub(rf"@%p\d+ st\.global\.b32 {re.escape(ticket[1])}.*;", "", text)

    x = inputs()
    done = editing(hook, FORWARD, change)
    found = verdict(x)
    assert any(done) and "counters not back" in found, found


def test_barriers(hook, small_tiles):
    """Every barrier but those that nothing needs: which these are is written down."""
    x, texts = inputs(), []
    hook.edit = lambda name, text: texts.append((name, text)) or text
    assert verdict(x) == ""
    text = next(text for name, text in texts if name == FORWARD)
    barriers = len(re.findall(r"bar\.sync", text))
    assert barriers > 10
    passing = []
    for which in range(barriers):
        editing(hook, FORWARD, replaced(r"bar\.sync\s+0;", "", which=which))
        if verdict(x) == "":
            passing.append(which - barriers)
    assert passing == UNNEEDED, f"{passing} of {barriers}"


def test_a_maximum_that_drops_nan(hook, small_tiles):
    """The interpreter keeps it either way."""
    x = inputs()
    with torch.no_grad():
        x.policy[0, 0, 3] = float("nan")
    assert run(CASES["hinge"], x, "triton")[0].loss.isnan()
    done = editing(hook, FORWARD, replaced(r"\.NaN", ""))
    assert run(CASES["hinge"], x, "triton")[0].loss.isfinite() and any(done)


def test_an_alignment_claimed_that_does_not_hold(hook):
    """The code for aligned tensors, on a policy that begins four bytes later."""
    x, texts = inputs((4, 64)), {}
    hook.edit = lambda name, text: texts.setdefault(name, text)
    assert verdict(x) == ""
    policy = torch.empty(x.policy.numel() + 1)[1:].view(x.policy.shape)
    policy.copy_(x.policy.detach())
    x.policy = policy
    hook.edit = lambda name, text: texts[name]
    with pytest.raises(RuntimeError, match=r"16 bytes at .* 16 does not divide"):
        run(CASES["dpo"], x, "triton")
