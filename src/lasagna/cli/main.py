"""The command ``lasagna``: a table of its subcommands, and what happens when one fails.

Each subcommand is one file in this folder and one line in `COMMANDS`::

    "demo": Command("lasagna.cli.demo:demo", "Seal a model, serve it and watch it work."),

A file is imported when its command runs or shows its own help, so ``lasagna --help`` stays fast
whatever the commands need. A command raises `LasagnaError` and leaves the rest to this file.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

from lasagna.errors import LasagnaError, UsageError


@dataclass(frozen=True, slots=True)
class Command:
    """Where a subcommand is, and its line in ``lasagna --help``.

    Attributes:
        target: ``module:name`` of a function with Typer's annotations, or of a `typer.Typer` if
            the command has subcommands of its own.
        summary: the first line of the function's docstring. A test compares them.
    """

    target: str
    summary: str

    def load(self, name: str) -> Any:
        """Import the command; its first line of help is the docstring's."""
        module, _, attribute = self.target.partition(":")
        found = getattr(importlib.import_module(module), attribute)
        if not isinstance(found, typer.Typer):
            alone = typer.Typer(add_completion=False)
            alone.command(name)(found)
            found = alone
        return typer.main.get_command(found)


COMMANDS: Final[dict[str, Command]] = {
    "demo": Command(
        "lasagna.cli.demo:demo",
        "Seal a real network, classify real photos in an enclave too small for it, show the cost.",
    ),
    "keygen": Command("lasagna.cli.keygen:keygen", "Make a model owner's signing key."),
    "seal": Command(
        "lasagna.cli.seal:seal",
        "Seal an ONNX model: cut it into slices, encrypt and sign them.",
    ),
    "inspect": Command("lasagna.cli.inspect:inspect", "Show what is in a sealed package."),
    "serve": Command(
        "lasagna.cli.serve:serve",
        "Serve sealed models from enclaves, over the Open Inference Protocol v2.",
    ),
    "infer": Command("lasagna.cli.infer:infer", "Run a model on a server, sealed for its enclave."),
    "measure": Command(
        "lasagna.cli.measure:measure", "Print the measurement of this version's enclave code."
    ),
    "epc": Command(
        "lasagna.cli.epc:app", "Run any program with an enclave's memory limit, and watch it page."
    ),
    "plan": Command(
        "lasagna.cli.plan:plan", "Plan which slices of models live on which servers of a cluster."
    ),
    "simulate": Command(
        "lasagna.cli.simulate:simulate",
        "Simulate a cluster: the same requests for each policy, in virtual time.",
    ),
    "trace": Command("lasagna.cli.trace:trace", "Show what ran when inside an enclave."),
    "insecure-broker": Command(
        "lasagna.cli.broker:insecure_broker",
        "Release models' keys to allowed enclaves; for development.",
    ),
}
"""The subcommands by name, in the order of ``lasagna --help``."""


# Typer keeps the classes of its contexts and commands private: hence Any.
class _Commands(TyperGroup):
    """The subcommands of `COMMANDS`, and the only place that turns errors into exit codes."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, command in COMMANDS.items():
            self.add_command(TyperCommand(name, help=command.summary))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Replace the placeholder, which only has a name and a summary, by the real command."""
        name, placeholder, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            return name, COMMANDS[name].load(name), rest
        return name, placeholder, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error becomes one line and an exit code, unless ``--debug``."""
        try:
            return super().invoke(ctx)
        except (LasagnaError, OSError) as error:
            # Typer knows what to do when the reader of a pipe has gone.
            if ctx.params["debug"] or isinstance(error, BrokenPipeError):
                raise
            _show(str(error) or type(error).__name__)
            raise typer.Exit(2 if isinstance(error, UsageError) else 1) from error


def _show(message: str) -> None:
    # One line, and nothing that a terminal would obey: the text may come from a server.
    line = "".join(char if char.isprintable() else " " for char in message)
    typer.secho(f"error: {line}", fg=typer.colors.RED, err=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lasagna {metadata.version('lasagna')}")
        raise typer.Exit


# Tracebacks, where one is shown, are Python's own: Typer's would print local variables' values.
app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def lasagna(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Secure DNN inference in SGX enclaves whose memory is smaller than the model."""


if __name__ == "__main__":
    sys.exit(app())
