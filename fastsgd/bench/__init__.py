"""Time fastsgd against torch.optim, in one run on one machine: `python -m fastsgd bench`."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from fastsgd.bench import report, scaling
from fastsgd.bench.contest import Settings
from fastsgd.bench.errors import BenchError
from fastsgd.bench.measure import Effort, frozen
from fastsgd.bench.my_model import shape_of
from fastsgd.bench.opponents import Opponent, found
from fastsgd.bench.options import parse, stock_modes
from fastsgd.bench.rules import RULES, Rule
from fastsgd.bench.schedule import Plan, run
from fastsgd.bench.shapes import DTYPES, SHAPES, Shape

# Rows of large shapes take long: there are none of what is much like another.
LARGE_RULES = ["sgd", "momentum", "adamw", "rmsprop", "adagrad"]
# --quick does not try all large shapes, and begins nothing that may end later than this.
QUICK_SHAPES = [name for name, shape in SHAPES.items() if not shape.large or name == "resnet-50"]
QUICK_RULES = ["sgd", "momentum", "adamw"]
QUICK_SECONDS = 45.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, and write JSON and the picture if asked.

    Args:
        argv: Options; `sys.argv[1:]` by default.

    Returns:
        The exit code: 0, or 1 if a result of fastsgd's is wrong or something asked for is missing.
    """
    options = parse(argv)
    try:
        look_for_packages(options)
        document = earlier(options.results) if options.results else measured(options)
        if options.json:
            options.json.write_text(json.dumps(document, indent=1) + "\n")
        if options.plot:
            from fastsgd.bench.picture import save

            save(options.plot, document)
    except (BenchError, OSError) as error:
        return fail(str(error))
    return 0


def fail(sentence: str) -> int:
    """Say on stderr what went wrong, after all that was printed before it; return exit code 1."""
    sys.stdout.flush()
    print(sentence, file=sys.stderr)
    return 1


def look_for_packages(options: argparse.Namespace) -> None:
    """See before a long run that what it will need is installed."""
    needed = {"benchmark": "tqdm"} if options.results is None else {}
    if options.plot:
        needed["picture"] = "matplotlib"
    for what, package in needed.items():
        if find_spec(package) is None:
            raise BenchError(f'The {what} needs {package}: run `pip install "fastsgd[bench]"`.')


def earlier(path: Path) -> dict[str, Any]:
    """What an earlier run has written."""
    try:
        document = json.loads(path.read_text())
        if not isinstance(document, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise BenchError(f"{path} is not what --json writes: {error}.") from error
    return document


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Run what the options ask for, print it, and return all of it."""
    from tqdm import tqdm

    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    try:
        mine = shape_of(options.my_model) if options.my_model else None
        plan = plan_of(options, mine)
        settings = Settings(torch.get_num_threads(), effort_of(options), device=options.device)
        print(report.heading(settings))
        if mine:
            print(report.model_line(options.my_model, mine))
        with frozen(), tqdm(unit="race", leave=False, disable=None) as bar:
            bar.reset(plan.races(settings))
            results = run(plan, replace(settings, tick=bar.update), bar.write)
        return report.document(results, vars(options), options.device)
    finally:
        torch.set_num_threads(before)


def plan_of(options: argparse.Namespace, mine: Shape | None = None) -> Plan:
    """What the options ask for; what is named is run, --quick or not.

    Args:
        options: Of the command line.
        mine: The shape of the user's own model.

    Raises:
        BenchError: If an opponent that was named cannot be imported.
    """
    opponents, words = opponents_of(options)
    curves = in_dtype(scaling.shapes(options.quick), options)
    scaled = rules(options.optimizer or scaling.RULE_NAMES, options)
    return Plan(
        options.sections,
        [(shape, rule) for shape in shapes_of(options, mine) for rule in rules_of(shape, options)],
        [(shape, rule) for shape in curves for rule in scaled],
        opponents,
        words,
        chained=options.model or (QUICK_SHAPES if options.quick else None),
        deadline=perf_counter() + QUICK_SECONDS if options.quick else float("inf"),
    )


def shapes_of(options: argparse.Namespace, mine: Shape | None) -> list[Shape]:
    """The user's model, those named, or those worth the time; each once in the dtype asked for."""
    names = options.model or ([] if mine else QUICK_SHAPES if options.quick else SHAPES)
    shapes = [SHAPES[name] for name in names]
    return list(dict.fromkeys(in_dtype([mine, *shapes] if mine else shapes, options)))


def in_dtype(shapes: Iterable[Shape], options: argparse.Namespace) -> list[Shape]:
    """The shapes in the dtype asked for."""
    if options.dtype is None:
        return list(shapes)
    return [shape.in_dtype(DTYPES[options.dtype]) for shape in shapes]


def rules_of(shape: Shape, options: argparse.Namespace) -> list[Rule]:
    """The rules for a shape: those named, or those worth its time."""
    few = QUICK_RULES if options.quick else LARGE_RULES if shape.large else list(RULES)
    return rules(options.optimizer or few, options)


def rules(names: Iterable[str], options: argparse.Namespace) -> list[Rule]:
    """Rules by name, with the modes of stock's that are raced."""
    modes = stock_modes(options)
    return [
        replace(rule, rivals=tuple(mode for mode in rule.rivals if mode.name in modes))
        for rule in map(RULES.__getitem__, names)
    ]


def opponents_of(options: argparse.Namespace) -> tuple[list[Opponent], dict[str, str]]:
    """Those named, or all that are installed, and a word on each."""
    if "steps" not in options.sections:
        return [], {}
    present, words = found(options.against)
    for name in words.keys() - {opponent.name for opponent in present}:
        if options.against:
            raise BenchError(
                f"{name}, named in --against, cannot be raced ({words[name]}): run "
                '`pip install "fastsgd[opponents]"`.'
            )
    return present, words


def effort_of(options: argparse.Namespace) -> Effort:
    """How long a race is: a row's seconds are shared by six races, which is how many SGD has."""
    seconds = options.seconds_per_case or (0.6 if options.quick else 4.0)
    return Effort(seconds / 6, pairs=3 if options.quick else 9)
