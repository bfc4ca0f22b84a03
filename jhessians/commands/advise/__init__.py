"""`advise`: what a finished fit says of itself: its tokens, its damping, its spectra.

`config.py` holds its options; `data.py` reads and divides the data, `halves.py` makes the passes
over them; `pipeline.py` puts all together, `words.py` and `tables.py` say it, and `numbers.py`
writes it as JSON.
"""

from __future__ import annotations

from jhessians.commands.advise.config import AdviseConfig
from jhessians.commands.command import Command, Positional

DESCRIPTION = """\
Examine the Kronecker factors of a finished run, ours or bergson's: are there
enough tokens (two halves of the data are fitted and compared), which damping is
worth most on documents that were held out, and in how many directions the
factors lie. Takes about as long as the run did; --spectrum_only takes seconds.
"""
EXAMPLES = """\
  jhessians advise runs/demo
  jhessians advise runs/pythia --half_documents 500 --json advice.json
  jhessians advise runs/pythia --spectrum_only
"""


def run(config: AdviseConfig) -> str | None:
    """Examine, and return what the terminal shows; None where another host says it."""
    # jax and transformers take seconds to import: --help must not wait for them.
    from jhessians.commands.advise.pipeline import advise

    return advise(config)


ADVISE = Command(
    name="advise",
    summary="say whether a fit has enough tokens, and which damping it needs",
    usage="RUN [--spectrum_only] [options]",
    description=DESCRIPTION,
    examples=EXAMPLES,
    config=AdviseConfig,
    positionals=(
        Positional("run", "Folder of a finished run of jhessians compute or of bergson.",
                   "jhessians advise runs/demo"),
    ),
    run=run,
    shows=True,
    compiles=True,
)  # fmt: skip
