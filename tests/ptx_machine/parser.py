"""The text of one PTX kernel, as instructions with their operands.

Only what a compiler writes is taken: one `.entry`, registers declared in ranges, one instruction a
statement. Anything else is an error with its line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .errors import UnknownInstruction


@dataclass(frozen=True)
class Register:
    """A register by its name, `%r12`, `%tid.x`; `negated` for `!%p1`."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """A number, as it is written."""

    text: str


@dataclass(frozen=True)
class Vector:
    """`{a, b}`; None stands for `_`."""

    parts: tuple[Register | Immediate | None, ...]


@dataclass(frozen=True)
class Address:
    """`[base + offset]`; the base is a register, or the name of a symbol or parameter."""

    base: Register | str
    offset: int = 0


Operand = Register | Immediate | Vector | Address | str


@dataclass(frozen=True)
class Instruction:
    """One statement.

    Attributes:
        line: in the text, from 1.
        text: the statement, without its comment.
        opcode: its parts between dots: `("ld", "global", "v4", "b32")`.
        operands: in order.
        guard: the predicate before it, or None.
    """

    line: int
    text: str
    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None = None


@dataclass
class Parsed:
    """A kernel.

    Attributes:
        name: of the entry.
        target: `sm_90a` and the like.
        parameters: names and their widths in bytes, in order.
        registers: bits of each prefix, 1 for predicates: `{"%rd": 64}`.
        shared: names of arrays in shared memory and their bytes, 0 where the launch says.
        instructions: in order.
        labels: positions in `instructions`.
        threads: of a program, where the text requires a number.
    """

    name: str = ""
    target: str = ""
    parameters: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    threads: int | None = None


_COMMENT = re.compile(r"//.*|/\*.*?\*/")
_IGNORED = (".version", ".address_size", ".file", ".global", ".maxntid")
_IGNORED += (".minnctapersm", ".maxnreg", ".pragma", ".noreturn", ".explicitcluster")
_WIDTH = {"8": 1, "16": 2, "32": 4, "64": 8}


def parse(text: str) -> Parsed:
    """Reads one kernel.

    Raises:
        UnknownInstruction: A statement has no form known here.
    """
    found = Parsed()
    inside = False
    for number, raw in enumerate(text.splitlines(), 1):
        line = _COMMENT.sub("", raw).strip()
        if inside and line == "}":
            return found  # behind the body is what debuggers read
        if not line or line in ("(", ")", "{"):
            inside = inside or (line == "{" and bool(found.name))
        elif inside:
            for statement in _statements(line):
                _inside(found, number, statement)
        else:
            _outside(found, number, line)
    raise UnknownInstruction("the text has no body, or one without an end")


def _statements(line: str) -> list[str]:
    return [part.strip() for part in line.split(";") if part.strip()]


def _outside(found: Parsed, number: int, line: str) -> None:
    """Directives before the body."""
    if match := re.match(r"\.target\s+(\w+)", line):
        found.target = match[1]
    elif match := re.search(r"\.entry\s+([\w$]+)", line):
        found.name = match[1]
    elif match := re.match(r"\.param\s+\.[a-z](\d+)\s.*?([\w$]+)\s*,?$", line):
        found.parameters[match[2]] = _WIDTH[match[1]]
    elif match := re.search(r"\.shared\s.*?\.[a-z](\d+)\s+([\w$]+)\[(\d*)\]", line):
        found.shared[match[2]] = int(match[3] or 0) * _WIDTH[match[1]]
    elif match := re.match(r"\.reqntid\s+(\d+)", line):
        found.threads = int(match[1])
    elif not line.startswith(_IGNORED):
        raise UnknownInstruction(f"line {number}: {line}")


def _inside(found: Parsed, number: int, statement: str) -> None:
    if match := re.match(r"\.reg\s+\.([a-z]+)(\d*)\s+(%[A-Za-z_]+)<\d+>$", statement):
        found.registers[match[3]] = int(match[2] or 1)
    elif statement.startswith((".loc", ".pragma")):
        return
    elif match := re.match(r"([\w$]+):\s*(.*)$", statement):
        found.labels[match[1]] = len(found.instructions)
        if match[2]:
            _inside(found, number, match[2])
    else:
        found.instructions.append(_instruction(number, statement))


def _instruction(number: int, statement: str) -> Instruction:
    match = re.match(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", statement, re.DOTALL)
    if match is None:
        raise UnknownInstruction(f"line {number}: {statement}")
    guard = Register(match[2], bool(match[1])) if match[2] else None
    opcode = tuple(match[3].replace("::", "_").split("."))
    operands = tuple(_operand(number, part) for part in _split(match[4]))
    return Instruction(number, statement, opcode, operands, guard)


def _split(text: str) -> list[str]:
    """At the commas outside brackets; a second destination, `%r1|%p1`, is one of its own."""
    parts, depth, start = [], 0, 0
    for k, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if depth == 0 and letter in ",|":
            parts.append(text[start:k].strip())
            start = k + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def _operand(number: int, text: str) -> Operand:
    if text.startswith("{"):
        parts = [_operand(number, p) for p in _split(text.strip("{} "))]
        return Vector(tuple(None if p == "_" else p for p in parts))  # pyright: ignore[reportArgumentType]
    if text.startswith("["):
        match = re.match(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]$", text)
        if match is None:
            raise UnknownInstruction(f"line {number}: address {text}")
        base = Register(match[1]) if match[1].startswith("%") else match[1]
        return Address(base, int(match[2] or "0", 0))
    if text.startswith(("%", "!%")):
        return Register(text.lstrip("!"), text.startswith("!"))
    if re.match(r"-?\d", text):
        return Immediate(text)
    if re.match(r"[\w$]+$", text):
        return text
    raise UnknownInstruction(f"line {number}: operand {text}")
