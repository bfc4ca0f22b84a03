"""`convert`: a Hugging Face checkpoint into an Orbax checkpoint of the Flax module, and back."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from jhessians.commands.command import Command, Positional
from jhessians.config.machine import ConsoleOptions, HostOptions
from jhessians.config.numbers import PRECISIONS
from jhessians.config.option import option
from jhessians.errors import ConfigError

CHECKPOINTS = "checkpoints"
FORMATS = {"flax": "Flax (Orbax)", "hf": "Hugging Face"}


@dataclass(frozen=True)
class ConvertConfig(ConsoleOptions, HostOptions):
    """Options of `convert`."""

    model: str = ""
    out: str = ""

    to: str | None = option(
        None,
        "Format to write: an Orbax checkpoint of the Flax module, or a Hugging Face checkpoint. "
        "That of MODEL itself writes it anew.",
        group=CHECKPOINTS, choices=tuple(FORMATS), default_text="the one that MODEL is not",
    )  # fmt: skip
    revision: str | None = option(
        None, "Branch, tag or commit of the model on the Hub.",
        group=CHECKPOINTS, metavar="REV", default_text="the main branch",
    )  # fmt: skip
    dtype: str | None = option(
        None, "Number format to store.",
        group=CHECKPOINTS, choices=PRECISIONS, default_text="the checkpoint's own",
    )  # fmt: skip

    def validate(self) -> None:
        """Raise ConfigError unless both places are named."""
        for name in ("model", "out"):
            if not getattr(self, name).strip():
                raise ConfigError(f"{name.upper()} is empty; give a folder")

    @property
    def needs_float64(self) -> bool:
        """Whether some array of JAX's must be in 64 bits."""
        return self.dtype == "fp64"


@dataclass(frozen=True)
class ConvertSummary:
    """What `convert` did, for its last line."""

    out: str
    format: str
    model_type: str
    parameters: int
    dtype: str

    def render(self) -> str:
        """One line for the terminal."""
        return (
            f"{self.out}: {FORMATS[self.format]} checkpoint, {self.model_type}, "
            f"{self.parameters:,} parameters in {self.dtype}"
        )


def convert(config: ConvertConfig) -> ConvertSummary:
    """Load a checkpoint and write it in the other format, with all that lies beside its weights.

    The parameters are spread over all devices; every process of a run on several hosts calls this.

    Returns:
        What was written: where, the format, the family, parameters and dtype.

    Raises:
        ConfigError: If a place isn't named.
        CheckpointError: If the model can't be loaded.
        NumericsError: If a weight isn't finite.
        OutputError: If the result can't be written.
    """
    # JAX takes long to import: --help must not wait for it.

    from converters import flax_checkpoint, hub, load, saving
    from converters.loading import STORED, parameters
    from jhessians.commands.hosts import join_hosts, require_shared
    from jhessians.commands.output import output_folder
    from jhessians.devices.hosts import require_same_in_turn, together
    from jhessians.devices.mesh import make_mesh
    from jhessians.interop.layout import DTYPES
    from jhessians.report.progress import Progress

    first = join_hosts(config, "convert")
    progress = Progress(quiet=config.quiet or not first)
    mesh = make_mesh()
    spread: dict[str, Any] = {"mesh": mesh, "fsdp": True} if mesh.size > 1 else {}
    with ExitStack() as stack:
        with together():
            directory = output_folder(config, "out", "convert", writer=first)
            part = stack.enter_context(directory)
        with progress.stage("Model"), together():
            source = hub.find(config.model, config.revision)
            target = config.to or ("hf" if flax_checkpoint.is_flax(source.folder) else "flax")
            dtype = STORED if config.dtype is None else DTYPES[config.dtype][1]
            loaded = load(
                config.model, dtype=dtype, revision=config.revision, compared=True, **spread
            )
        require_same_in_turn("weights", *loaded.model.origin.parts)
        if target == "flax":
            require_shared(part)
        with progress.stage("Writing"):
            write = flax_checkpoint.write_flax if target == "flax" else saving.write
            write(loaded, part)
        with together():
            stack.close()
    arrays = [variable.get_value() for variable in parameters(loaded.model).values()]
    return ConvertSummary(
        out=config.out,
        format=target,
        model_type=loaded.config.model_type,
        parameters=sum(array.size for array in arrays),
        dtype=loaded.dtype.name,
    )


def run(config: ConvertConfig) -> str | None:
    """Convert, and return the last line; None where another host says it."""
    import jax

    summary = convert(config)
    return summary.render() if jax.process_index() == 0 else None


DESCRIPTION = """\
Convert a Hugging Face checkpoint into an Orbax checkpoint of the Flax module,
which --model and converters.load take as well, or one of those back into a
Hugging Face checkpoint: the same names and bits.
"""
EXAMPLES = """\
  jhessians convert EleutherAI/pythia-160m pythia-flax
  jhessians convert pythia-flax pythia-again
"""

CONVERT = Command(
    name="convert",
    summary="convert a checkpoint from Hugging Face to Flax, or back",
    usage="MODEL OUT [options]",
    description=DESCRIPTION,
    examples=EXAMPLES,
    config=ConvertConfig,
    positionals=(
        Positional("model", "Hugging Face Hub name or local folder of the checkpoint, in either "
                   "format.", "jhessians convert EleutherAI/pythia-160m pythia-flax"),
        Positional("out", "Folder to write.", "jhessians convert pythia-flax pythia"),
    ),
    run=run,
)  # fmt: skip
