"""Commands and their options; each command is a file of its own."""

import logging

import typer

from swan.cli.bench import bench
from swan.cli.calibrate import calibrate
from swan.cli.capacity import capacity
from swan.cli.demo import demo
from swan.cli.errors import Commands
from swan.cli.evaluate import evaluate
from swan.cli.frontier import frontier
from swan.cli.generate import generate
from swan.cli.info import info
from swan.cli.serve import serve

# transformers imports torchao where it is installed, which logs each library of other devices that it cannot load.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)

app = typer.Typer(
    cls=Commands,
    help="Smaller key-value caches by rotation and winnowing (SWAN, arXiv:2511.18936).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (info, calibrate, generate, evaluate, frontier, serve, capacity, demo):
    app.command()(command)
app.add_typer(bench, name="bench")
