"""``python -m cpfold_train bench OP``: forward and backward of one op at Boltz-2's widths, with what it costs."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

import torch
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cpfold_train.errors import ConfigError
from cpfold_train.interrupts import before_spawning
from cpfold_train.kernels.choice import INSTALL, KERNELS, PACKAGES, is_installed
from cpfold_train.memory import return_large_tensors
from cpfold_train.model.config import ModelConfig
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.cost import ALGORITHMS
from cpfold_train.parallel.gather import barrier
from cpfold_train.parallel.grid import Grid, parse_grid, squarest
from cpfold_train.parallel.rendezvous import join_rendezvous
from cpfold_train.paths import CHECKOUT
from cpfold_train.simulate.bench.case import ATOMS_PER_TOKEN, Sizes
from cpfold_train.simulate.bench.cases import CASES
from cpfold_train.simulate.bench.inputs import allocate_gradients, make_features, make_inputs, precision, randomise
from cpfold_train.simulate.bench.measure import machine, measure
from cpfold_train.simulate.bench.simulate import simulate
from cpfold_train.simulate.bench.trunk_cases import TRUNK

MIB = 2**20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    widths = ModelConfig()
    parser.add_argument("op", choices=CASES, metavar="OP", help=", ".join(CASES))
    parser.add_argument("--n", type=int, default=384, help="tokens (default: 384)")
    parser.add_argument("--grid", metavar="RxC", help="grid of ranks (default: 1x1, or the squarest of --world)")
    parser.add_argument(
        "--world", type=int, metavar="P", help="start no ranks: bytes and memory of one rank of a simulated world of P"
    )
    parser.add_argument("--rank", type=int, default=0, metavar="K", help="which rank of the world (default: 0)")
    parser.add_argument("--msa-depth", type=int, default=128, metavar="S", help="MSA sequences (default: 128)")
    parser.add_argument("--atoms", type=int, metavar="A", help="atoms (default: 8.2 a token)")
    parser.add_argument("--samples", type=int, default=4, metavar="M", help="diffusion samples (default: 4)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="fp32",
        help="precision; bf16 is trainer.precision=bf16-true: z and m in bf16, products under autocast, the model's "
        "islands of fp32 as in training (default: fp32)",
    )
    parser.add_argument("--token-z", type=int, default=widths.token_z, help="width of z (default: %(default)s)")
    parser.add_argument(
        "--algorithm", choices=ALGORITHMS, default="auto", help="of the triangle ops (default: auto, by the cost model)"
    )
    parser.add_argument("--kernels", choices=KERNELS[1:], default="torch", help="of the pair stack (default: torch)")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps, of which the median counts (default: 3)")
    parser.add_argument("--threads", type=int, help="threads a rank (default: cores / ranks, at least 1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda runs one rank a GPU over NCCL")
    parser.add_argument("--against", choices=["boltz"], help="also time the stock package's serial module in this call")
    parser.add_argument(
        "--boltz-python",
        default=boltz_python(),
        metavar="PATH",
        help="interpreter that has the boltz package (default: the variable BOLTZ_PYTHON, else this one if it has)",
    )
    parser.add_argument("--boltz-threads", type=int, default=os.cpu_count(), help="its threads (default: all cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def boltz_python() -> str | None:
    """Interpreter that has the boltz package: the variable ``BOLTZ_PYTHON``, else this one if it has it, else None."""
    return os.environ.get("BOLTZ_PYTHON") or (sys.executable if find_spec("boltz") else None)


def run(args: argparse.Namespace) -> None:
    """Time the op and print the results.

    Raises:
        ConfigError: for options that cannot work together.
    """
    grid = _grid(args)
    atoms = grid.pad_atoms(args.atoms or math.ceil(ATOMS_PER_TOKEN * args.n))
    sizes = Sizes(grid.pad_tokens(args.n), grid.pad_rows(args.msa_depth), atoms, args.samples)
    if args.world:
        config, dtype = ModelConfig(token_z=args.token_z), DTYPES[args.dtype]
        found = simulate(args.op, config, sizes, grid, dtype, args.algorithm, args.kernels)
        ranks = [{"peak_mib": found["peak_bytes"] / MIB, "ops": found["ops"]}]
        _show(_summary(ranks, args, grid, sizes) | {"simulated": True, "rank": args.rank}, args.json)
        return
    threads = args.threads or max(1, (os.cpu_count() or 1) // grid.cp_size)
    if args.device == "cuda" and grid.cp_size > torch.cuda.device_count():
        raise ConfigError(
            f"--grid {grid} needs {grid.cp_size} GPUs and there are {torch.cuda.device_count()}: type a smaller --grid"
        )
    _require_kernels(args.kernels, args.device, args.dtype)
    if args.against and not args.boltz_python:
        raise ConfigError("--against boltz needs the package: type pip install -e '.[boltz]', or --boltz-python PATH")

    if args.against and args.op not in TRUNK:
        raise ConfigError(f"--against boltz compares ops of the trunk: type one of {', '.join(TRUNK)}")

    with tempfile.TemporaryDirectory() as folder:
        job = {**vars(args), "sizes": sizes, "threads": threads, "folder": folder}
        # Ranks must not start with more threads than they get: OpenMP reads this once.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        before_spawning()
        mp.spawn(_rank, (grid.rows, grid.cols, job), grid.cp_size)
        ranks = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(grid.cp_size)]
        result = _summary(ranks, args, grid, sizes) | {
            "threads_per_rank": threads,
            "repeats": args.repeats,
            "wall_s": max(rank["wall_s"] for rank in ranks),
            "cpu_s_total": sum(rank["cpu_s"] for rank in ranks),
        }
        if args.against:
            result["against"] = _stock(args, folder, sizes)
            result["against"]["time_ratio"] = result["wall_s"] / result["against"]["wall_s"]
            result["against"]["memory_ratio"] = max(result["peak_mib_per_rank"]) / result["against"]["peak_mib"]
    _show(result, args.json)


def _require_kernels(kernels: str, device: str, dtype: str) -> None:
    """Raise ConfigError where kernels cannot run here. Triton's run on a CPU only through its interpreter."""
    if kernels == "torch":
        return
    if device != "cuda" and not (kernels == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise ConfigError(f"--kernels {kernels} needs GPUs: type --device cuda, or --kernels torch")
    if dtype == "fp64":
        raise ConfigError(f"--kernels {kernels} has no fp64: type --dtype fp32, or --kernels torch")
    if not is_installed(kernels):
        raise ConfigError(
            f"--kernels {kernels} needs the {PACKAGES[kernels]} package: type {INSTALL[kernels]}, or --kernels torch"
        )


def _grid(args: argparse.Namespace) -> Grid:
    """The grid asked for, at the rank to simulate.

    Raises:
        ConfigError: where they do not fit the simulated world.
    """
    rows, cols = squarest(args.world or 1) if args.grid is None else parse_grid(args.grid)
    ranks = rows * cols
    if args.world and ranks != args.world:
        raise ConfigError(f"--grid {rows}x{cols} has {ranks} ranks: type --world {ranks}, or leave --grid out")
    if args.world and args.against:
        raise ConfigError("a simulated world takes no time that could be compared: leave out --world or --against")
    if not 0 <= args.rank < ranks or (args.rank and not args.world):
        raise ConfigError(f"--rank {args.rank} is for a simulated world: type --world P with a P above it")
    return Grid(rows, cols, 1, args.rank)


def _rank(rank: int, rows: int, cols: int, job: dict) -> None:
    """One rank of the benchmark, in a process of its own."""
    torch.set_num_threads(job["threads"])
    return_large_tensors()
    device = torch.device(job["device"], rank) if job["device"] == "cuda" else torch.device("cpu")
    join_rendezvous(Path(job["folder"]), rank, rows * cols, device)
    cp = ContextParallel(Grid(rows, cols, 1, rank), device.type, algorithm=job["algorithm"], kernels=job["kernels"])

    torch.manual_seed(rank)
    config = ModelConfig(token_z=job["token_z"])
    case = CASES[job["op"]]
    module = case.build(config)
    randomise(module)
    if rank == 0 and job["against"]:
        torch.save(module.state_dict(), Path(job["folder"]) / "state.pt")
    dtype = DTYPES[job["dtype"]]
    weights, mixed = precision(dtype, device)
    module = module.to(device, weights)
    allocate_gradients(module)
    x = make_features(case.inputs, job["sizes"], cp.grid, device)
    x |= make_inputs(case.inputs, config, job["sizes"], cp.grid, dtype, device)

    def forward() -> tuple[Tensor, ...]:
        with mixed:
            return case.call(module, x, cp)

    grads = [torch.randn_like(out) for out in forward()]

    def step() -> None:
        cp.ledger.reset()
        torch.autograd.backward(forward(), grads)

    measured = measure(step, job["repeats"], device, lambda: barrier(cp))
    ops = {op: asdict(entry) for op, entry in cp.ledger.by_op().items()}
    (Path(job["folder"]) / f"rank{rank}.json").write_text(json.dumps({**asdict(measured), "ops": ops}))


def _summary(ranks: list[dict], args: argparse.Namespace, grid: Grid, sizes: Sizes) -> dict:
    """What is told of real ranks and of a simulated one alike."""
    tile = (sizes.n // grid.rows) * (sizes.n // grid.cols) * args.token_z * DTYPES[args.dtype].itemsize
    sent = [sum(entry["sent_bytes"] for entry in rank["ops"].values()) for rank in ranks]
    by_op = {
        op: {
            "sent_tiles": mean(rank["ops"][op]["sent_bytes"] for rank in ranks) / tile,
            "messages": mean(rank["ops"][op]["messages"] for rank in ranks),
            "exposed_comm_s": mean(rank["ops"][op]["waited_s"] for rank in ranks),
        }
        for op in ranks[0]["ops"]
    }
    return {
        "op": args.op,
        **asdict(sizes),
        "grid": str(grid),
        "dtype": args.dtype,
        "algorithm": args.algorithm,
        "peak_mib_per_rank": [rank["peak_mib"] for rank in ranks],
        "sent_mib_per_rank": [sent_bytes / MIB for sent_bytes in sent],
        "tile_mib": tile / MIB,
        "sent_tiles": mean(sent) / tile,
        "exposed_comm_s": mean(sum(entry["waited_s"] for entry in rank["ops"].values()) for rank in ranks),
        "by_op": by_op,
        "machine": machine(),
    }


def _stock(args: argparse.Namespace, folder: str, sizes: Sizes) -> dict:
    """Measurements of the stock package's module on one rank of the same kind of device, with the weights of ours."""
    config = ModelConfig(token_z=args.token_z)
    source, target = Path(folder) / "stock-in.pt", Path(folder) / "stock-out.pt"
    widths = {"token_s": config.token_s, "token_z": config.token_z, "msa_s": config.msa.msa_s}
    given = {"op": args.op, "n": sizes.n, "depth": sizes.msa_depth, "widths": widths, "repeats": args.repeats}
    given |= {"threads": args.boltz_threads, "dtype": DTYPES[args.dtype], "device": args.device}
    torch.save({**given, "state": torch.load(Path(folder) / "state.pt", weights_only=True)}, source)
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": str(args.boltz_threads)}
    done = subprocess.run(
        [args.boltz_python, "-m", "cpfold_train.simulate.bench.stock", str(source), str(target)],
        env=environment,
        stdout=sys.stderr,
    )
    if done.returncode:
        raise ConfigError(f"{args.boltz_python} could not run the stock module: type --boltz-python with boltz in it")
    return {"package": "boltz", "threads": args.boltz_threads, **torch.load(target, weights_only=True)}


def _show(result: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=1))
        return
    console = Console()
    title = f"{result['op']}, N = {result['n']}, grid {result['grid']}, {result['dtype']}, forward and backward"
    table = Table("metric", "value", title=title)
    if "wall_s" in result:
        table.add_row("wall time", f"{result['wall_s']:.3f} s")
        table.add_row("CPU time, all ranks", f"{result['cpu_s_total']:.3f} s")
    peaks = (f"{mib:.{1 if mib < 10 else 0}f}" for mib in result["peak_mib_per_rank"])
    table.add_row("peak memory a rank", ", ".join(peaks) + " MiB")
    table.add_row("sent a rank", f"{mean(result['sent_mib_per_rank']):.1f} MiB = {result['sent_tiles']:.2f} tiles")
    table.add_row("waiting for messages", f"{result['exposed_comm_s']:.3f} s")
    if against := result.get("against"):
        table.add_row("stock boltz", f"{against['wall_s']:.3f} s, {against['peak_mib']:.0f} MiB")
        table.add_row("ratio to it", f"{against['time_ratio']:.2f} time, {against['memory_ratio']:.2f} memory")
    console.print(table)
    if result["by_op"]:
        ops = Table("operation", "tiles sent", "messages", "waiting, s")
        for op, entry in result["by_op"].items():
            ops.add_row(op, f"{entry['sent_tiles']:.2f}", f"{entry['messages']:.0f}", f"{entry['exposed_comm_s']:.3f}")
        console.print(ops)
    spec = result["machine"]
    if "simulated" in result:
        console.print(f"rank {result['rank']} of a simulated world, torch {spec['torch']}")
    else:
        console.print(
            f"{spec.get('gpu', spec['cpu'])}, {spec['cores']} cores, {result['threads_per_rank']} threads a rank, "
            f"torch {spec['torch']}, median of {result['repeats']}"
        )
