"""What all commands have in common: options that may stand anywhere, and errors as one paragraph with an exit code."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from orchestrator.cluster.driver_process import second_interrupt_leaves
from orchestrator.commands.console import Output

EVERYWHERE = ("--json", "-v", "--verbose")
"""Options that may stand anywhere on the command line."""


class Commands(TyperGroup):
    """All commands: global options anywhere, and errors as one paragraph with an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        moved = [arg for arg in args[:end] if arg in EVERYWHERE]
        rest = [arg for arg in args[:end] if arg not in EVERYWHERE]
        return super().parse_args(ctx, [*moved, *rest, *args[end:]])

    def invoke(self, ctx: Any) -> Any:
        try:
            with second_interrupt_leaves():
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if hasattr(error, "exit_code"):  # a usage error: typer shows it
                raise
            output = ctx.obj if isinstance(ctx.obj, Output) else Output()
            raise typer.Exit(output.error(error)) from None
