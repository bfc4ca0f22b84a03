"""What `advise` does: read the factors, examine halves of the data, and put it into words."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax

from jhessians.commands.advise.config import AdviseConfig
from jhessians.commands.advise.halves import examine
from jhessians.commands.advise.numbers import Advice, numbers
from jhessians.commands.advise.words import render
from jhessians.commands.hosts import join_hosts, require_same_files
from jhessians.commands.output import write_json
from jhessians.config.option import name_flags, options_of
from jhessians.devices.hosts import together
from jhessians.influence.inversion import Inverse
from jhessians.influence.spectra import curvatures, factor_spectra
from jhessians.interop.load import FactorStore
from jhessians.report.progress import Progress


def advise(config: AdviseConfig) -> str | None:
    """Examine a run; every process of several hosts calls this.

    Args:
        config: Validated.

    Returns:
        What the terminal shows; None on hosts that have nothing to say.

    Raises:
        UserError: If the run, its model or its data can't be read.
        OutputError: If the file of `json` can't be written.
    """
    if not config.spectrum_only:
        join_hosts(config, "advise")
        require_same_files(runs=config.run)
    first = jax.process_index() == 0
    names = {each.name for each in options_of(type(config))}
    progress = Progress(quiet=config.quiet or not first, reword=partial(name_flags, names=names))
    with together():
        store = FactorStore(config.run)
        spectra = factor_spectra(store)
        own = curvatures(store, Inverse(damping_factor=config.damping_factor))
        positions = store.total_processed
    examined = None if config.spectrum_only else examine(config, store, progress)
    advice = Advice(
        config.run, config.damping_factor, positions, spectra, own, examined,
        tuple(progress.warnings),
    )  # fmt: skip
    with together():
        if first and config.json is not None:
            write_json(numbers(advice), Path(config.json))
    return render(advice) if first else None
