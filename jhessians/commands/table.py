"""All subcommands, in the order of the list in `--help`."""

from jhessians.commands.compute import COMPUTE
from jhessians.commands.convert import CONVERT
from jhessians.commands.mix import MIX
from jhessians.commands.score import SCORE

COMMANDS = {command.name: command for command in (COMPUTE, SCORE, MIX, CONVERT)}
"""By name."""
