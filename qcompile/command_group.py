"""How the command line is taken apart, apart from what its commands do: `qcompile MODEL` beside subcommands, exit statuses."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import click

from qcompile.errors import QcompileError
from qcompile.printing import ReaderGone

INTERRUPTED = 130  # 128 + SIGINT, as shells count
_BROKEN_PIPE = 141  # 128 + SIGPIPE
_DEFAULT = "compile"
_USAGE = (
    "MODEL [OPTIONS]",
    "check FLOAT QUANTISED --eval SPEC",
    "inspect MODEL",
    "bench MODEL...",
    "bundle MODEL -o DIR",
    "diff A B --eval SPEC",
    "sensitivity MODEL --data SPEC",
    "passes",
)


@dataclass
class Invocation:
    """What holds for one run of the program, whichever command it is."""

    traceback: bool = False


class CompileGroup(click.Group):
    """A group whose hidden command `compile` takes every command line that does not begin with a subcommand's name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Options may stand before MODEL, so the choice is made before anything is parsed."""
        if not args:
            raise click.UsageError("no model is given")
        if args[0] not in self.commands and args[0] != "--help":
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One line for each command."""
        for index, line in enumerate(_USAGE):
            formatter.write_usage("qcompile", line, prefix=None if index == 0 else "       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options of the hidden command, then the subcommands."""
        self.commands[_DEFAULT].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


class CompileCommand(click.Command):
    """The hidden command; its help is the program's."""

    def get_help(self, ctx: click.Context) -> str:
        """The help of the group."""
        return (ctx.parent or ctx).get_help()


def run(group: click.Group, args: Sequence[str] | None) -> int:
    """Run one command line; returns the exit status. Every error is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to stop
    invocation = Invocation()
    try:
        status = group.main(args, prog_name="qcompile", standalone_mode=False, obj=invocation)
    except click.ClickException as error:
        return _fail(f"{error.format_message()} (see qcompile --help)", error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print("qcompile: interrupted", file=sys.stderr)
        return INTERRUPTED
    except QcompileError as error:
        if invocation.traceback:
            traceback.print_exc()
        return _fail(str(error), error.exit_status)
    except ReaderGone:
        return _BROKEN_PIPE
    except Exception as error:  # a fault of the program: said in one line, with the way to see more
        if invocation.traceback:
            traceback.print_exc()
        hint = "" if invocation.traceback else "; run again with --traceback and report it"
        return _fail(f"internal error: {type(error).__name__}: {error}{hint}", 1)
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int) -> int:
    print(f"qcompile: error: {' '.join(message.split())}", file=sys.stderr)
    return status
