"""Which process of a run hangs or has ended: what each knows of the others, and its judgement."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from fastpo.system.alive import ProcessName
from fastpo.system.process import named_ranks
from fastpo.train.progress import Place

PATIENCE = 6
"""How many times as long as `train.hang_timeout` what is slow may take."""

INTERVAL = 2.0
"""Seconds from one beat to the next."""

_STORE_GRACE = 30.0  # seconds


@dataclass(frozen=True)
class Beat:
    """What a process tells the others.

    Attributes:
        number: Counts its beats.
        name: The process.
        place: Where it stands.
        left: None while it runs; empty when it left in order, else why it stopped.
        gone: Ranks of its machine that are gone.
    """

    number: int
    name: ProcessName
    place: Place
    left: str | None = None
    gone: tuple[int, ...] = ()

    def pack(self) -> str:
        """Returns it as text."""
        return json.dumps(asdict(self) | {"place": list(self.place)})

    @classmethod
    def unpack(cls, text: bytes) -> Beat:
        """Reads what `pack` made."""
        raw = json.loads(text)
        name, place = ProcessName(**raw["name"]), Place(*raw["place"])
        return cls(raw["number"], name, place, raw["left"], tuple(raw["gone"]))


@dataclass
class Seen:
    """The last beat of a process, and when it changed, by this process's clock in seconds.

    Attributes:
        beat: The last beat.
        beaten: When it came.
        moved: When its place changed.
    """

    beat: Beat
    beaten: float
    moved: float


class Watch:
    """What this process knows of all, and its judgement; no threads, no clock of its own.

    Args:
        mine: This process's first beat.
        rank: Its number.
        count: Number of processes.
        timeout: `train.hang_timeout`, in seconds.
        now: The time, in seconds; so are all others.
        interval: Seconds from one beat to the next.
    """

    def __init__(
        self,
        mine: Beat,
        *,
        rank: int,
        count: int,
        timeout: float,
        now: float,
        interval: float = INTERVAL,
    ) -> None:
        self.rank, self.count, self.timeout, self.interval = rank, count, timeout, interval
        self.seen = {rank: Seen(mine, now, now)}
        self.gone: dict[int, float] = {}
        self.exchanged = now
        self.store_is_lost = False

    def move(self, place: Place, now: float) -> None:
        """Takes in where this process stands."""
        mine = self.seen[self.rank]
        if place.count != mine.beat.place.count:
            mine.moved = now
            mine.beat = replace(mine.beat, place=place)

    def see(self, beats: Sequence[Beat], now: float) -> None:
        """Takes in the beats of all processes, by rank; none while one has not joined yet."""
        self.exchanged = now
        for rank, beat in enumerate(beats):
            if rank == self.rank:
                continue
            last = self.seen.get(rank)
            if last is None:
                self.seen[rank] = Seen(beat, now, now)
                continue
            if beat.place.count != last.beat.place.count:
                last.moved = now
            if beat.number != last.beat.number:
                last.beaten = now
            last.beat = beat

    def look(self, now: float) -> None:
        """Asks the system for the other processes of this machine."""
        for rank, seen in self.seen.items():
            if rank != self.rank and seen.beat.left is None:
                if seen.beat.name.state() == "ended":
                    self.gone.setdefault(rank, now)

    def forgive(self, seconds: float) -> None:
        """Lets time not count in which this process was stopped itself."""
        self.exchanged += seconds
        self.gone.clear()
        for seen in self.seen.values():
            seen.beaten += seconds
            seen.moved += seconds

    def lost(self, now: float, *, grace: float) -> str | None:
        """Says which process has ended or stopped with an error.

        Args:
            now: The time.
            grace: Seconds in which this process may find out by itself.
        """
        for rank, seen in self.seen.items():
            if rank != self.rank and seen.beat.left and now - seen.beaten >= grace:
                return f"rank {rank} stopped: {seen.beat.left}"
        for seen in self.seen.values():
            for rank in seen.beat.gone:
                self.gone.setdefault(rank, now)
        for rank, since in self.gone.items():
            seen = self.seen[rank]
            # It may have left in order, which its last beat tells: that must have been read.
            told = self.exchanged > since or now - since >= 2 * max(INTERVAL, self.interval)
            if seen.beat.left is None and told:
                return f"{self._named(rank)} has ended; last seen at {seen.beat.place}"
        return None

    def hung(self, now: float) -> str | None:
        """Says which process hangs, and where."""
        mine = self.seen[self.rank]
        if now - mine.moved < min(self.timeout, _STORE_GRACE):
            return None
        if self.store_is_lost and not mine.beat.place.slow:
            return f"{self._store()} no longer answers"
        if now - mine.moved < self.timeout:
            return None
        if now - self.exchanged >= self.timeout:
            return f"{self._store()} gives no sign of life for {now - self.exchanged:.0f} s"
        return self._silent(now) or self._behind(now)

    def _silent(self, now: float) -> str | None:
        for rank, seen in self.seen.items():
            silent = self.exchanged - seen.beaten
            if rank != self.rank and seen.beat.left is None and silent >= self.timeout:
                return (
                    f"{self._named(rank)} gives no sign of life for {silent:.0f} s"
                    f"{self._why(rank)}; last seen at {seen.beat.place}"
                )
        return None

    def _may_be_silent(self, rank: int) -> bool:
        silent = self.exchanged - self.seen[rank].beaten
        return rank != self.rank and 2 * self.interval <= silent < self.timeout

    def _behind(self, now: float) -> str | None:
        mine = self.seen[self.rank]
        if now - mine.moved < self._allowed(mine.beat.place):
            return None
        missing = [rank for rank in range(self.count) if rank not in self.seen]
        if missing:
            return f"{named_ranks(missing)} did not join within {now - mine.moved:.0f} s"
        places = {rank: s.beat.place for rank, s in self.seen.items() if s.beat.left is None}
        least = min(place.count for place in places.values())
        last = [rank for rank, place in places.items() if place.count == least]
        stalled = min(now - self.seen[rank].moved for rank in last)
        where = places[last[0]]
        if stalled < self._allowed(where):
            return None
        # Its last beat came after its last progress, so its silence is told a little later.
        if any(self._may_be_silent(rank) for rank in last):
            return None
        if len(last) == len(self.seen):
            return f"no process has made progress for {stalled:.0f} s: all are at {where}"
        who = self._named(last[0]) if len(last) == 1 else named_ranks(last)
        have = "has" if len(last) == 1 else "have"
        return (
            f"{who} {have} made no progress for {stalled:.0f} s: {where}, while rank {self.rank} "
            f"is at {mine.beat.place}"
        )

    def _store(self) -> str:
        """Names who holds the store through which the processes find one another."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or 0 not in self.seen:
            return "the launcher, which holds the store of the processes,"
        where = f"{self._named(0)}{self._why(0)}"
        return f"{where}, which holds the store of the processes,"

    def _why(self, rank: int) -> str:
        stopped = self.seen[rank].beat.name.state() == "stopped"
        return ", stopped by a signal" if stopped else ""

    def _allowed(self, place: Place) -> float:
        return self.timeout * (PATIENCE if place.slow else 1)

    def _named(self, rank: int) -> str:
        return f"rank {rank} ({self.seen[rank].beat.name})"
