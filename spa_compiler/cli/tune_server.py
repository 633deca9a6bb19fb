"""`spa-tune-server`: lends this machine to compilations elsewhere, which take their times on it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from spa_compiler import __version__
from spa_compiler.cli.errors import exit_codes, logging_to

if TYPE_CHECKING:
    from spa_compiler.placement.timer import Machine

_EPILOG = """\b
Examples:
  python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port 9190            the tracker, anywhere in the network
  spa-tune-server --tracker 10.0.0.5:9190 --key zen5 --host 0.0.0.0    on the machine that takes the times
  spa-compile model.onnx --tune-rpc 10.0.0.5:9190,zen5                 where you work

Whoever reaches the port may run code here: TVM's protocol has no passwords. Use it in a network that you trust.
"""


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--tracker", required=True, metavar="HOST:PORT", help="TVM's RPC tracker (python -m tvm.exec.rpc_tracker)"
)
@click.option("--key", required=True, metavar="KEY", help="What compilations call this machine, and others like it")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 for all")
@click.option("--port", type=click.IntRange(1, 65435), default=9091, show_default=True, help="The first port to try")
@click.option("--address", metavar="HOST", help="Where clients find this machine  [default: where the tracker sees it]")
@click.option("-v", "--verbose", is_flag=True, help="More log on stderr")
@click.option("--log-file", metavar="FILE", type=click.Path(), help="The whole log, into a file")
@click.version_option(__version__, prog_name="spa-tune-server")
@exit_codes
def main(
    tracker: str, key: str, host: str, port: int, address: str | None, verbose: bool, log_file: str | None
) -> None:
    """Take times here for spa-compile --tune-rpc elsewhere, until interrupted.

    Compilations come one after the other; ONNX Runtime's dense operators and sparse kernels take turns in this process.
    """
    found = re.fullmatch(r"(.+):(\d{1,5})", tracker)
    if found is None:
        raise click.UsageError(f"--tracker {tracker!r} is no HOST:PORT")
    if not re.fullmatch(r"[\w.-]+", key):
        raise click.UsageError(f"--key {key!r}: letters, digits, points and dashes only")
    logging_to(verbose, False, log_file)

    from spa_compiler.placement.serve import serve

    def ready(machine: Machine) -> None:
        click.echo(f"{key}: {machine.cpu}, {machine.isa}, ONNX Runtime {machine.onnxruntime}")

    serve((found[1].strip("[]"), int(found[2])), key, host=host, port=port, address=address, ready=ready)


if __name__ == "__main__":
    main()
