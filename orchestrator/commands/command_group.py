"""Behaviour of all commands.

Global options in any position, and errors as one paragraph with an exit status.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from orchestrator.cluster.driver_process import second_interrupt_exits
from orchestrator.commands.console import Output

EVERYWHERE = ("--json", "-v", "--verbose")
"""Options that are accepted in any position on the command line."""


class Commands(TyperGroup):
    """The group of all commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Move the global options to the front, where typer expects them."""
        end = args.index("--") if "--" in args else len(args)
        global_options = [arg for arg in args[:end] if arg in EVERYWHERE]
        others = [arg for arg in args[:end] if arg not in EVERYWHERE]
        return super().parse_args(ctx, [*global_options, *others, *args[end:]])

    def invoke(self, ctx: Any) -> Any:
        """Run a command; print its error, if any, and exit with the error's status."""
        try:
            with second_interrupt_exits():
                return super().invoke(ctx)
        # typer ends the process for these itself, without a message where the reader of a pipe has gone.
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if hasattr(error, "exit_code"):  # typer prints usage errors itself
                raise
            output = ctx.obj if isinstance(ctx.obj, Output) else Output()
            raise typer.Exit(output.error(error)) from None
