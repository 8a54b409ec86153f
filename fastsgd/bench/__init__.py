"""Time fastsgd against torch.optim, in one run on one machine: `python -m fastsgd bench`."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from time import perf_counter

import torch

from fastsgd.bench import report
from fastsgd.bench.contest import Settings
from fastsgd.bench.measure import Effort, frozen
from fastsgd.bench.opponents import found
from fastsgd.bench.rules import RULES
from fastsgd.bench.schedule import SECTIONS, Plan, run
from fastsgd.bench.shapes import SHAPES
from fastsgd.bench.steps import WrongResultError

# Rows of large shapes take long: there are none of what is much like another.
LARGE_RULES = ["sgd", "momentum", "adamw", "rmsprop", "adagrad"]
# --quick does not try all large shapes, and begins nothing that may end later than this.
QUICK_SHAPES = [name for name, shape in SHAPES.items() if not shape.large or name == "resnet-50"]
QUICK_RULES = ["sgd", "momentum", "adamw"]
QUICK_SECONDS = 45.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, and write JSON if asked.

    Args:
        argv: Options; `sys.argv[1:]` by default.

    Returns:
        The exit code: 0, or 1 if a result of fastsgd's is wrong or tqdm is missing.
    """
    options = parse(argv)
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return fail('The benchmark needs tqdm: run `pip install "fastsgd[bench]"`.')
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    try:
        print(report.heading())
        plan, effort = plan_of(options), effort_of(options)
        with frozen(), tqdm(unit="race", leave=False, disable=None) as bar:
            settings = Settings(torch.get_num_threads(), effort, bar.update)
            bar.reset(plan.races(settings))
            results = run(plan, settings, bar.write)
        if options.json:
            document = report.document(results, vars(options) | {"json": str(options.json)})
            options.json.write_text(json.dumps(document, indent=1) + "\n")
    except (WrongResultError, OSError) as error:
        return fail(str(error))
    finally:
        torch.set_num_threads(before)
    return 0


def fail(sentence: str) -> int:
    """Say on stderr what went wrong, after all that was printed before it; return exit code 1."""
    sys.stdout.flush()
    print(sentence, file=sys.stderr)
    return 1


def plan_of(options: argparse.Namespace) -> Plan:
    """What the options ask for; what is named is run, --quick or not."""
    sections = options.sections or list(SECTIONS)
    opponents, words = found() if "steps" in sections else ([], {})
    shapes = options.shapes or (QUICK_SHAPES if options.quick else list(SHAPES))
    return Plan(
        sections,
        [(shape, rule) for shape in shapes for rule in rules_of(shape, options)],
        opponents,
        words,
        chained=shapes if options.shapes or options.quick else None,
        deadline=perf_counter() + QUICK_SECONDS if options.quick else float("inf"),
    )


def rules_of(shape: str, options: argparse.Namespace) -> list[str]:
    """The rules for a shape: those named, or those worth its time."""
    if options.optimizers:
        return list(options.optimizers)
    if options.quick:
        return QUICK_RULES
    return LARGE_RULES if SHAPES[shape].large else list(RULES)


def effort_of(options: argparse.Namespace) -> Effort:
    """How long a race is: a row's seconds are shared by six races, which is how many SGD has."""
    seconds = options.seconds_per_case or (0.6 if options.quick else 4.0)
    return Effort(seconds / 6, pairs=3 if options.quick else 9)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; argparse ends the program with a message when one is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m fastsgd bench",
        description="Time fastsgd against torch.optim: ratios, from runs in turn.",
    )
    parser.add_argument("--quick", action="store_true", help="end within a minute")
    parser.add_argument("--json", type=json_path, metavar="PATH", help="write everything there too")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="NAME", help=names(SHAPES))
    parser.add_argument("--optimizers", nargs="+", choices=RULES, metavar="NAME", help=names(RULES))
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, metavar="NAME", help=names(SECTIONS)
    )
    parser.add_argument(
        "--threads", type=threads, help="ours, and the most of stock's; torch's by default"
    )
    parser.add_argument(
        "--seconds-per-case",
        type=seconds,
        metavar="SECONDS",
        help="a row of the table takes at least this long, large shapes longer (4; quick 0.6)",
    )
    return parser.parse_args(argv)


def names(of: Iterable[str]) -> str:
    """The help of an option that takes names."""
    return f"of {', '.join(of)}"


def threads(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of threads")
    return int(text)


def seconds(text: str) -> float:
    """A positive number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def json_path(text: str) -> Path:
    """A file in a folder that exists: a long run should not end in a bad name."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    return path
