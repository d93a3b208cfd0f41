"""The typer application: one module a command."""

from __future__ import annotations

import typer

from .._version import __version__
from ..support.allocator import freed_memory_kept
from . import (
    bench,
    compare,
    convert,
    demo,
    distill,
    doctor,
    evaluate,
    export,
    inspect,
    recommend,
    reproduce,
    sample,
)

app = typer.Typer(
    name="dlms",
    help="Sample diffusion and flow models well in 3 to 10 network evaluations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="--debug, anywhere, shows the traceback of an error.",
)
app.command()(demo.demo)
app.command("recommend")(recommend.recommend_command)
app.command("distill")(distill.distill_command)
app.command()(sample.sample)
app.command("convert")(convert.convert_command)
app.command("evaluate")(evaluate.evaluate_command)
app.command("compare")(compare.compare_command)
app.command("reproduce")(reproduce.reproduce_command)
app.command()(inspect.inspect)
app.command()(export.export)
app.command()(doctor.doctor)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(bench.bench)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dlms_engine {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Sample diffusion and flow models well in 3 to 10 network evaluations."""
    if context.invoked_subcommand != "bench":  # it times what a library's user would see
        context.with_resource(freed_memory_kept())
