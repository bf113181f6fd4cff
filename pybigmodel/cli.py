"""The command line: ``pybigmodel demo | doctor | bench``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

import pybigmodel
from pybigmodel._console import CommandError


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pybigmodel", description="PyTorch models, same code and checkpoints, faster."
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"pybigmodel {pybigmodel.__version__}, torch {torch.__version__}",
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON instead of tables")
    common.add_argument(
        "--threads", type=_positive, metavar="N", help="threads (default: torch's own choice)"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        parents=[common],
        help="embed real sentences with all-MiniLM-L6-v2, before and after pbm.optimize",
    )
    demo.add_argument("--sentences", type=_positive, default=384, metavar="N", help="how many")
    demo.add_argument("--batch-size", type=_positive, default=32, metavar="N")
    demo.add_argument(
        "--rounds",
        type=_positive,
        default=3,
        metavar="N",
        help="timed rounds, of which the fastest counts",
    )

    doctor = commands.add_parser(
        "doctor", parents=[common], help="what this machine can do, and what torch makes of it"
    )
    doctor.add_argument("--quick", action="store_true", help="shorter, less exact measurements")

    bench = commands.add_parser(
        "bench", parents=[common], help="linear layers in every precision against torch eager"
    )
    bench.add_argument("--quick", action="store_true", help="fewer shapes, in a few seconds")
    return parser


def _run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The command's facts, and the same as text. Commands are imported when they run."""
    if options.command == "demo":
        from pybigmodel import _demo

        return _demo.run(options.sentences, options.batch_size, options.rounds)
    if options.command == "doctor":
        from pybigmodel import _doctor

        return _doctor.run(quick=options.quick)
    from pybigmodel import _bench

    return _bench.run(quick=options.quick)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        facts, text = _run(options)
    except CommandError as error:
        print(f"pybigmodel {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(facts, indent=2) if options.json else text)
    return 0
