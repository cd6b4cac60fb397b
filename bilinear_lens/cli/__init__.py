"""`bilinear-lens`: commands that parse, call the library, and print."""

import sys
import warnings

import transformers
import typer
from rich.console import Console
from rich.markup import escape

from bilinear_lens.cli import bilinearize, circuits, data, features, lens, sweeps, train

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Read bilinear transformers from their weights: the eigenvectors of what each MLP writes.",
)
for command in (
    lens.demo,
    lens.info,
    lens.explain,
    circuits.trace,
    sweeps.sweep,
    sweeps.search,
    lens.convert,
    lens.push,
    data.clean,
    bilinearize.bilinearize,
):
    app.command()(command)
app.add_typer(features.app, name="features")
app.add_typer(train.app, name="train")
app.command("explain-image")(lens.explain_image)


def main() -> None:
    """The entry point: a fault of the input is one line and exit code 2."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        app(prog_name="bilinear-lens")
    except (ValueError, KeyError) as error:
        message = " ".join(str(error.args[0] if error.args else error).split())
        Console(stderr=True, highlight=False).print(
            f"[bold red]error:[/] {escape(message)}", soft_wrap=True
        )
        sys.exit(2)
