"""The command line: `python -m fastsgd demo | info | bench`."""

import argparse
import importlib
import sys
from collections.abc import Sequence

import fastsgd

COMMANDS = {
    "demo": "what a training loop is, in four parts",
    "info": "versions, instruction set, threads, CUDA or why not",
    "bench": "time fastsgd against torch.optim",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    A command is the module of its name, imported only now, so that `info` needs nothing that
    only `demo` or `bench` uses.

    Args:
        argv: The command and its own options; `sys.argv[1:]` by default.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m fastsgd",
        usage="%(prog)s [-h] [--version] COMMAND [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n"
        + "\n".join(f"  {name:<6} {what}" for name, what in COMMANDS.items())
        + "\n\n`python -m fastsgd COMMAND -h` lists a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"fastsgd {fastsgd.__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of those below")
    if not arguments:
        parser.print_help()
        return 0
    # Only the first word is parsed here; what follows belongs to the command's own parser.
    command = parser.parse_args(arguments[:1]).command
    code: int = importlib.import_module(f"fastsgd.{command}").main(arguments[1:])
    return code


if __name__ == "__main__":
    sys.exit(main())
