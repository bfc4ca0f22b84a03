"""All subcommands, in the order of the list in `--help`."""

from jhessians.commands import evaluate
from jhessians.commands.advise import ADVISE
from jhessians.commands.apply import APPLY
from jhessians.commands.build import BUILD
from jhessians.commands.compute import COMPUTE
from jhessians.commands.convert import CONVERT
from jhessians.commands.mix import MIX
from jhessians.commands.plan import PLAN
from jhessians.commands.score import SCORE
from jhessians.commands.top import TOP
from jhessians.commands.verify import VERIFY

COMMANDS = {
    command.name: command
    for command in (
        COMPUTE,
        PLAN,
        SCORE,
        TOP,
        *evaluate.EVALUATE,
        ADVISE,
        BUILD,
        APPLY,
        MIX,
        CONVERT,
        VERIFY,
    )
}
"""By name, of one word or two."""

GROUPS = {"evaluate": evaluate.SUMMARY}
"""First words of names that have two, and what they do together."""
