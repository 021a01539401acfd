"""Coverage-guided fuzzing: cases whose draws are changed until they reach new lines of ours.

`pip install atheris`, then, for instance,

    python -m tests.faults.fuzz.coverage_guided override CORPUS -runs=10000 -max_len=200

Everything after the kind is libFuzzer's: a folder that keeps the draws which reached something
new, and its options. An exception of another kind than FastPO's ends it, with the draws in a file
`crash-*`; given instead of the folder, that file is run alone.
"""

import random
import sys

import atheris

with atheris.instrument_imports(include=["fastpo"], enable_loader_override=False):
    from tests.faults.fuzz.cases import KINDS, drawn_case


class Draws(random.Random):
    """Draws given by bytes, so that a change of bytes is a change of draws; 0 when they end."""

    def __init__(self, content: bytes) -> None:
        super().__init__(0)
        self._bytes = iter(content)

    def random(self) -> float:
        return int.from_bytes(self._take(4), "big") / 2**32

    def getrandbits(self, k: int, /) -> int:
        return int.from_bytes(self._take((k + 7) // 8), "big") & ((1 << k) - 1)

    def _take(self, number: int) -> bytes:
        return bytes(next(self._bytes, 0) for _ in range(number))


def main() -> None:
    kind = sys.argv.pop(1)
    if kind not in KINDS:
        sys.exit(f"{kind!r} is none of {', '.join(KINDS)}")
    atheris.Setup(sys.argv, lambda content: drawn_case(kind, Draws(content)) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
