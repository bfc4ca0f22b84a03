"""Live feedback on standard error: a bar on a terminal, plain lines elsewhere, or nothing.

    progress = Progress()
    with progress.stage("Covariances", total=positions, unit="positions") as stage:
        for batch in batches:
            stage.advance(fit(batch))
    progress.timings  # {"Covariances": 12.3}

JAX returns before it has computed: advance a stage by what is *done* (after
`block_until_ready`), or its rate is that of dispatching.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock

from rich import progress as rich_progress
from rich.console import Console
from rich.text import Text

from jhessians.config.units import rate_in_words, seconds_in_words
from jhessians.devices import place
from jhessians.errors import printable

Clock = Callable[[], float]


class Stage:
    """One step of a run, with a known amount of work or none.

    Attributes:
        name: As shown.
        total: Amount of work, None if unknown.
        unit: Plural noun of what is counted.
        done: How much has been done.
    """

    def __init__(self, name: str, total: int | None, unit: str, clock: Clock) -> None:
        self.name = name
        self.total = total
        self.unit = unit
        self.done = 0
        self._clock = clock
        self._start = clock()
        self._warm: tuple[float, int] | None = None
        self._latest: tuple[float, int] = (self._start, 0)
        self._lock = Lock()
        self._on_advance: Callable[[], None] = lambda: None

    def advance(self, amount: int = 1) -> None:
        """Count `amount` more units as done; safe to call from several threads."""
        place.move()
        with self._lock:
            self.done += amount
            self._latest = (self._clock(), self.done)
            if self._warm is None:
                self._warm = self._latest
            self._on_advance()

    @property
    def seconds(self) -> float:
        """Time since the stage began."""
        return self._clock() - self._start

    @property
    def rate(self) -> float | None:
        """Units per second, None before anything is done.

        The first advance is left out once there are more: it holds the compilation.
        """
        now, done = self._latest
        before, done_before = self._warm or (self._start, 0)
        if done == done_before:
            before, done_before = self._start, 0
        if done == done_before or now <= before:
            return None
        return (done - done_before) / (now - before)

    @property
    def seconds_left(self) -> float | None:
        """Time that the rest will take at this rate, None if it can't be told."""
        if self.total is None or not self.rate:
            return None
        since = self._clock() - self._latest[0]
        return max(0.0, (self.total - self.done) / self.rate - since)

    @property
    def share(self) -> float | None:
        """Part of the work that is done, from 0 to 1; None if the total is unknown."""
        if self.total is None:
            return None
        return min(1.0, self.done / self.total) if self.total else 1.0


class Progress:
    """Shows the stages of a run as they go and remembers how long each took.

    Stages follow one another; a stage opened inside another is a programming error.

    Args:
        quiet: Show nothing, as on every process but the first one of several hosts.
        console: Where to write, standard error by default.
        clock: Seconds, for tests.
        around: Called with each stage's name for a context to run it in.
        reword: What is done to notes and warnings, such as making flags of options' names.

    Attributes:
        timings: Seconds by stage name, in order; a name used twice holds the sum, in the last
            one's place.
        notes: What `note` was told.
        warnings: What `warn` was told.
        reword: As it was given.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        console: Console | None = None,
        clock: Clock = time.perf_counter,
        around: Callable[[str], AbstractContextManager[object]] = lambda name: nullcontext(),
        reword: Callable[[str], str] = lambda line: line,
    ) -> None:
        self.timings: dict[str, float] = {}
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._quiet = quiet
        self._around = around
        self.reword = reword
        self._open: Stage | None = None

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Stage]:
        """Show a stage while the block runs.

        Args:
            name: A noun or two, such as "Covariances".
            total: Units of work, None if unknown.
            unit: Plural noun of a unit, such as "positions".

        Yields:
            The stage, to advance.

        Raises:
            RuntimeError: If another stage is still open.
        """
        if self._open is not None:
            raise RuntimeError(f"stage {name!r} begins inside stage {self._open.name!r}")
        stage = Stage(name, total, unit, self._clock)
        self._open = stage
        place.enter(name)
        try:
            with self._around(name), self._display(stage):
                yield stage
            self._say(_closing_line(stage))
        finally:
            self._open = None
            self.timings[name] = self.timings.pop(name, 0.0) + stage.seconds

    def note(self, message: str) -> None:
        """Say one line between or inside stages."""
        self.notes.append(self.reword(message))
        self._say(self.notes[-1])

    def warn(self, message: str) -> None:
        """Say one line that belongs into the run's summary, too."""
        self.warnings.append(self.reword(message))
        self._say(f"warning: {self.warnings[-1]}")

    def _say(self, line: str) -> None:
        if not self._quiet:
            self._console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def _display(self, stage: Stage) -> AbstractContextManager[object]:
        if self._quiet:
            return nullcontext()
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            return self._bar(stage)
        return self._plain(stage)

    @contextmanager
    def _bar(self, stage: Stage) -> Iterator[None]:
        columns: list[rich_progress.ProgressColumn] = [
            rich_progress.SpinnerColumn(),
            rich_progress.TextColumn("{task.description}", markup=False),
        ]
        if stage.total is not None:
            columns += [rich_progress.BarColumn(bar_width=None), rich_progress.TaskProgressColumn()]
        columns.append(_StageColumn(stage))
        bar = rich_progress.Progress(*columns, console=self._console, transient=True, expand=True)
        task = bar.add_task(stage.name, total=stage.total)
        stage._on_advance = lambda: bar.update(task, completed=stage.done)
        with bar:
            yield

    @contextmanager
    def _plain(self, stage: Stage) -> Iterator[None]:
        work = f": {stage.total:,} {stage.unit}".rstrip() if stage.total is not None else ""
        self._say(f"{stage.name}{work} ...")
        said = 0

        def say_tenth() -> None:
            nonlocal said
            tenth = int((stage.share or 0.0) * 10)
            # The closing line stands for 100 %.
            if said < tenth < 10:
                said = tenth
                self._say(f"{stage.name}: {tenth * 10} %{_pace(stage, ', ')}")

        stage._on_advance = say_tenth
        yield


class _StageColumn(rich_progress.ProgressColumn):
    """Rate and time left on the right of the bar; time so far where no total is known."""

    max_refresh = 0.5

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        super().__init__()

    def render(self, task: rich_progress.Task) -> Text:
        words = _pace(self._stage, "  ").strip() or seconds_in_words(self._stage.seconds)
        return Text(words, style="dim", no_wrap=True)


def _pace(stage: Stage, separator: str) -> str:
    parts = []
    if stage.rate is not None and stage.unit:
        parts.append(rate_in_words(stage.rate, stage.unit))
    if stage.seconds_left is not None:
        parts.append(f"{seconds_in_words(stage.seconds_left)} left")
    return "".join(separator + part for part in parts)


def _closing_line(stage: Stage) -> str:
    """`Covariances: 32,640 positions in 12 s, 2,720 positions/s`."""
    took = seconds_in_words(stage.seconds)
    if not stage.done or not stage.unit:
        return f"{stage.name}: done in {took}"
    line = f"{stage.name}: {stage.done:,} {stage.unit} in {took}"
    return line + (f", {rate_in_words(stage.rate, stage.unit)}" if stage.rate else "")
