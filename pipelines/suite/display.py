"""What is shown while the suite runs: a line a worker and one bar for all; plain lines without a terminal."""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import Any

from tqdm import tqdm

PLAIN_EVERY = 60.0  # seconds between two lines where there is no terminal

log = logging.getLogger(__name__)


class Display:
    """Counts steps. ``expect`` adds those of a task, ``event`` is called with what workers tell."""

    def __init__(self) -> None:
        self.interactive = sys.stderr.isatty()
        self.guard = threading.Lock()
        self.expected: dict[str, int] = {}  # steps by cell
        self.done: dict[str, int] = {}
        self.began: dict[str, tuple[float, int]] = {}  # when a cell was first heard of, and at which step
        self.lines: dict[str, Any] = {}
        self.bar = tqdm(total=0, desc="suite", unit="step", disable=not self.interactive, bar_format="{desc}")
        self.shown = time.monotonic()

    def expect(self, cell: str, steps: int) -> None:
        with self.guard:
            self.expected[cell] = steps

    def finished(self, cell: str) -> None:
        """A cell is done, or will not be."""
        with self.guard:
            self.done[cell] = self.expected.get(cell, 0)

    def event(self, event: Any) -> None:
        """Called by Dask's client, in a thread of its own."""
        content = event[1] if isinstance(event, tuple) else event
        if "text" in content:
            self.say(content["level"], content["text"])
            return
        now, worker = time.monotonic(), content["who"]
        with self.guard:
            for cell, step in content["done"].items():
                self.began.setdefault(cell, (now, step))
            self.done |= content["done"]
            at = f"step {content['step']} of {content['steps']}, loss {content['loss']:.3f}"
            text = f"  {worker}: {content['cell']}, {at}"
            if self.interactive:
                if worker not in self.lines:
                    place = len(self.lines) + 1
                    self.lines[worker] = tqdm(total=0, position=place, bar_format="{desc}", leave=False)
                self.lines[worker].set_description_str(text)
                self.bar.set_description_str(self.summary(now))
            elif now - self.shown > PLAIN_EVERY:
                self.shown = now
                log.info("%s; %s", self.summary(now), text.strip())

    def summary(self, now: float) -> str:
        total, done = sum(self.expected.values()), sum(self.done.values())
        share = done / total if total else 0.0
        left = self.left(now)
        eta = (
            ""
            if left is None
            else f", about {left / 60:.0f} min to go"
            if left > 90
            else f", about {left:.0f} s to go"
        )
        cells = sum(self.done.get(cell, 0) == steps for cell, steps in self.expected.items())
        return f"suite: {cells} of {len(self.expected)} trainings done, {share:.0%} of the steps{eta}"

    def left(self, now: float) -> float | None:
        """Seconds to go, from the seconds that a step has taken. A cell that is not under way counts as the
        mean of those that are or were."""
        rates = [
            (now - since) / (self.done[cell] - step)
            for cell, (since, step) in self.began.items()
            if self.done[cell] > step and self.done[cell] < self.expected.get(cell, 0)
        ]
        if not rates:
            return None
        together = max(1, len(rates))  # cells that advance side by side, over all workers
        steps = sum(total - self.done.get(cell, 0) for cell, total in self.expected.items())
        return steps * (sum(rates) / len(rates)) / together

    def say(self, level: int, text: str) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            log.log(level, "%s", text)

    def close(self) -> None:
        for line in (*self.lines.values(), self.bar):
            line.close()
