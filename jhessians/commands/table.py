"""All subcommands, in the order of the list in `--help`."""

from jhessians.commands.apply import APPLY
from jhessians.commands.build import BUILD
from jhessians.commands.compute import COMPUTE
from jhessians.commands.convert import CONVERT
from jhessians.commands.mix import MIX

COMMANDS = {command.name: command for command in (COMPUTE, BUILD, APPLY, MIX, CONVERT)}
"""By name."""
