"""Keep back what Orbax and TensorStore print of an error that they raise, too."""

import gc
import logging
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from jhessians.errors import CheckpointError

_SILENCE_SECONDS = 0.1
"""After an error it is over once nothing has complained for so long."""


@contextmanager
def one_line(folder: Path) -> Iterator[None]:
    """Say in one line what Orbax and TensorStore come up with over a damaged file.

    Args:
        folder: For the message.

    Raises:
        CheckpointError: Instead of whatever error leaves the block.
    """
    try:
        with quietly():
            yield
    except Exception as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
    else:
        return
    raise CheckpointError(
        f"{folder} can't be read as a Flax checkpoint: {reason}; convert or copy it again"
    )


@contextmanager
def quietly() -> Iterator[None]:
    """Keep back what Orbax prints of an error; afterwards everything is as it was before.

    It logs the error with a traceback from each of its threads, and its unfinished reads and writes
    complain when they are thrown away, or come back and find nobody waiting.
    """
    hook = sys.unraisablehook
    kept_back: list[str] = []

    def pass_on(what: Any) -> None:
        code = getattr(what.object, "cr_code", None)
        orbax = code is not None and "orbax" in code.co_filename
        if orbax or str(what.exc_value) == "Event loop is closed":
            kept_back.append(str(what.exc_value))
        else:
            hook(what)

    with ExitStack() as stack:
        # Each of these is put back even if Ctrl-C ends what comes before it.
        stack.callback(setattr, sys, "unraisablehook", hook)
        sys.unraisablehook = pass_on
        for logger in map(logging.getLogger, ("absl", "asyncio")):
            stack.callback(setattr, logger, "disabled", logger.disabled)
            logger.disabled = True
        stack.callback(gc.collect)
        try:
            yield
        except BaseException as error:
            _let_go(error)
            gc.collect()
            count = -1
            while count != len(kept_back):
                count = len(kept_back)
                time.sleep(_SILENCE_SECONDS)
            raise


def _let_go(error: BaseException | None) -> None:
    """Clear the variables of all functions through which an error and its causes came.

    What is unfinished hangs on them, and would complain only when the error is forgotten.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
