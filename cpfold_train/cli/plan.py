"""``python -m cpfold_train plan KEY=VALUE ...``: whether a run fits, and what it costs, before it is started."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from cpfold_train.config.compose import of_run, read_request
from cpfold_train.errors import ConfigError
from cpfold_train.plan.command import command_of, write_config
from cpfold_train.plan.estimate import ASSUMPTIONS, FLOOR
from cpfold_train.plan.plan import GIB, Plan, plan_prediction, validation_moment
from cpfold_train.plan.propose import memory_presets, plan_run, propose
from cpfold_train.plan.report import show_plan, show_proposals, typed_options
from cpfold_train.simulate.trace import Moment

PREDICTION = (
    "diffusion.samples=5",
    "diffusion.sampling_steps=200",
    "model.recycling_steps=3",
    "data.max_msa_rows=8192",
)
"""Defaults of the ``predict`` command, as keys of a run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="as for train.py; and device=NAME (default: h100-80gb), gpus=N, the most of a proposal (default: 256)",
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="write the configuration of what is planned, of proposals the fastest, to FILE.yaml",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--check",
        action="store_true",
        help="run small configurations, or the one that is typed, and compare them with their plans",
    )
    parser.add_argument(
        "--predict",
        action="store_true",
        help="plan the prediction of one query of crop_size tokens on cp.grid; diffusion.samples=5, "
        "diffusion.sampling_steps=200, model.recycling_steps=3 and data.max_msa_rows=8192 are the defaults",
    )
    parser.add_argument(
        "--memory-options",
        action="store_true",
        help="a table of what each memory option saves and costs",
    )
    parser.add_argument("--measure", action="store_true", help="with --memory-options: run it on CPUs of this machine")
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="plan 768 to 32,768 tokens on 1, 4, 16 ... gpus=N GPUs: cells to FILE.json, where it goes on if it was "
        "interrupted, a picture to FILE.png, and the table, in Markdown, on the terminal",
    )


def run(args: argparse.Namespace) -> None:
    """Plan and print.

    Raises:
        ConfigError: for settings that cannot be planned.
    """
    if args.check:
        from cpfold_train.plan.compare import compare

        compare(args.settings, args.json)
        return
    own = PREDICTION if args.predict else ()
    # A table has grids of its own.
    request = read_request([*own, *args.settings, *(["cp.grid=auto"] if args.table else ())])
    config = request.config
    if args.predict:
        if request.grid is None:
            raise ConfigError("a prediction is planned on one grid: type cp.grid=2x2, for example")
        with Console(stderr=True).status("planning"):
            _show(plan_prediction(config, request.grid, request.device), None, args.json)
        return
    if args.memory_options:
        from cpfold_train.plan.memory_options import show_memory_options

        show_memory_options(of_run(args.settings), request.grid, request.device, args.measure, args.json)
        return
    if args.table:
        from cpfold_train.plan.capacity import as_markdown, capacity, draw

        cells = capacity(config, request.device, request.gpus, args.table.with_suffix(".json"))
        draw(cells, f"{request.device}, {config.trainer.precision}", args.table.with_suffix(".png"))
        print(as_markdown(cells))
        for i, memory in enumerate(memory_presets(config, request.device)):
            print(f"({i}) {' '.join(typed_options(memory))}")
        return
    if request.grid is None:
        found = propose(config, request.device, request.gpus, request.dp, request.choose)
        command = _command(found[0], args) if found else ""
        if args.json:
            several = [p.as_dict() | {"command": command_of(p, args.settings)} for p in found]
            print(json.dumps({"proposals": several, "assumptions": ASSUMPTIONS}, indent=1))
        else:
            show_proposals(found, request.device, config.crop_size, request.gpus, command)
        return
    with Console(stderr=True).status("planning"):
        found = plan_run(config, request.grid, request.device, request.choose)
        validation = validation_moment(found.config, request.grid, request.device) if config.data.val else None
    _show(found, validation, args.json, _command(found, args))


def _command(found: Plan, args: argparse.Namespace) -> str:
    """What runs a plan, from the file that is written where one is asked for."""
    return command_of(found, args.settings) if args.write is None else write_config(found, args.settings, args.write)


def _show(found: Plan, validation: Moment | None, as_json: bool, command: str = "") -> None:
    if as_json:
        held = {} if validation is None else {"validation_peak_gib": sum(validation.values()) / GIB}
        typed = {"command": command} if command else {}
        print(json.dumps({**found.as_dict(), **held, **typed, "assumptions": [*ASSUMPTIONS, FLOOR]}, indent=1))
    else:
        show_plan(found, validation, command)
