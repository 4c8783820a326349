"""Every classification network of torchvision through the analysis, the surgery, the cost formulas and ONNX.

    python benchmarks/zoo.py --json zoo.json --markdown zoo_table.md
    python benchmarks/zoo.py --only resnet18,vit_b_16
    python benchmarks/zoo.py --build net.py:make_net --shape 1,3,224,224
    python benchmarks/zoo.py --timm

Each network runs in a process of its own, with random weights, on the smallest input that it takes. A row says how many
groups were found, offered (each one proven) and locked, what share of the parameters of convolutions and linear layers
(with attention's packed projections) lies in tensors that offered groups slice, and what became of a random policy at
half the multiply-adds: whether the smaller network equals the dense one with the removed elements zeroed, whether its
cost by formula is its cost by count, and whether its ONNX file computes the same. A network passes if all of that holds
and the analysis of up to 100 M parameters took no more than 4 GB.

`--build` takes a network of your own: a function without arguments that returns it, or it and an example input. A
network is made anew for every use; its constant parameters and its batch-norm statistics are replaced by random ones,
so that no zero or one hides a fault.

`--json FILE --resume` keeps the rows that the file has and runs what is missing; with `--only` it runs those anew.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from autoprune.cost import Budget, CostModel, FeasibleSet, count
from autoprune.errors import AutopruneWarning, ConfigError, InfeasibleBudgetError
from autoprune.export import to_onnx
from autoprune.inputs import call, each_tensor
from autoprune.structure import Structure, analyse, cut, plan

SIZES = (32, 64, 75, 96, 128, 160, 192, 224, 240, 256, 288)
"""Heights and widths that are tried, smallest first."""

_TIMM = """
    resnet10t resnetv2_50 seresnext26ts res2net50_14w_8s skresnet18 dla46_c hrnet_w18_small ese_vovnet19b_dw
    cspresnet50 repvgg_a0 mobileone_s0 mobilenetv4_conv_small ghostnet_050 mixnet_s lcnet_050 rexnet_100
    nf_regnet_b0 convnextv2_atto edgenext_xx_small fastvit_t8 poolformer_s12 mixer_s32_224 resmlp_12_224
    gmlp_ti16_224 deit_tiny_patch16_224 cait_xxs24_224 xcit_nano_12_p16_224 levit_128s pvt_v2_b0 mobilevit_xxs
"""
TIMM = tuple(_TIMM.split())
"""Thirty architectures of different families, small ones."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest difference from the masked network allowed, relative to what two inputs make different in its output."""

MEMORY_LIMIT_MB, MEMORY_LIMIT_PARAMETERS = 4096, 100_000_000
COVERED = 0.9


@dataclass
class Row:
    """What was found of one network; `faults` is empty if it passed."""

    name: str
    input: list[Any] = field(default_factory=list)
    parameters: int = 0
    found: int = 0
    offered: dict[str, int] = field(default_factory=dict)  # by kind
    locked: list[dict[str, Any]] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    share: float | None = None
    in_the_way: list[str] = field(default_factory=list)
    macs: float | None = None  # left of the dense network's, by the policy
    difference: float | None = None
    precision: str | None = None
    formula: dict[str, int] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)
    onnx: str | None = None  # "equal", or what went wrong
    onnx_seconds: float | None = None
    analysis_seconds: float | None = None
    seconds: float | None = None
    analysis_peak_mb: int | None = None
    peak_mb: int | None = None
    remarks: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


# -- one network ------------------------------------------------------------------------------------------------------


def examine(name: str, model: nn.Module, example_input: Any, *, onnx: bool = True, seed: int = 0) -> Row:
    """Put one network through everything.

    Args:
        name: What the row is called.
        model: The network; its precision is changed.
        example_input: What it runs on.
        onnx: Whether to write and check an ONNX file.
        seed: Randomness of the policy and of the inputs.
    """
    started = time.monotonic()
    row = Row(name, [list(leaf.shape) for leaf in _tensors(example_input)])
    row.parameters = sum(parameter.numel() for parameter in model.parameters())
    try:
        _examine(row, model.eval(), example_input, onnx, np.random.default_rng(seed))
    except Exception as error:  # whatever it is, it is this network's row
        row.faults.append(f"in {_where(error)}: {_one_line(error)}")
    row.seconds = round(time.monotonic() - started, 2)
    row.peak_mb = _peak_mb()
    return row


def _examine(row: Row, model: nn.Module, example_input: Any, onnx: bool, rng: np.random.Generator) -> None:
    started = time.monotonic()
    structure = analyse(model, example_input, kinds=("channels", "heads"))
    row.analysis_seconds = round(time.monotonic() - started, 2)
    row.analysis_peak_mb = _peak_mb()
    row.found = len(structure) + len(structure.locked)
    row.offered = dict(Counter(group.kind for group in structure))
    row.locked = [asdict(group) for group in structure.locked]
    row.given_up = list(structure.given_up)
    if row.analysis_peak_mb > MEMORY_LIMIT_MB and row.parameters <= MEMORY_LIMIT_PARAMETERS:
        row.faults.append(f"the analysis took {row.analysis_peak_mb:,} MB")
    row.share, row.in_the_way = _share(model, example_input, structure)
    if row.share < COVERED:
        on_request = analyse(model, example_input, kinds=("channels", "heads"), normalised=True)
        row.remarks.append(f"{_share(model, example_input, on_request)[0]:.1%} covered with normalised groups")
    if not len(structure):
        row.faults.append("no group is offered")
        return

    costs = CostModel(model, example_input, structure)
    row.unknown = dict(costs.unknown)
    counts = _half(structure, costs, rng, row)
    removed = {group.name: sorted(rng.permutation(group.size)[: counts[group.name]].tolist()) for group in structure}
    smaller = cut(model, plan(model, structure, removed))
    formula, counted = costs.cost(counts), count(smaller, example_input).cost
    for metric in ("macs", "params", "bytes", "activations"):
        row.formula[metric], row.counted[metric] = getattr(formula, metric), getattr(counted, metric)
        if row.formula[metric] != row.counted[metric]:
            row.faults.append(f"{metric}: {row.formula[metric]:,} by formula, {row.counted[metric]:,} by count")
    row.macs = round(counted.macs / max(1, costs.dense.macs), 4)
    if onnx:
        started = time.monotonic()
        row.onnx = _onnx(smaller, example_input, row)
        row.onnx_seconds = round(time.monotonic() - started, 2)
    _compare(row, model, smaller, structure, removed, example_input)


def _half(structure: Structure, costs: CostModel, rng: np.random.Generator, row: Row) -> dict[str, int]:
    """Return random counts that leave half of the multiply-adds, or as near as the groups allow."""
    sparsities = rng.uniform(0.0, 0.9, len(structure))
    try:
        feasible = FeasibleSet.build(structure, costs, Budget.parse("macs<=50%"), max_sparsity=0.95)
        counts = feasible.project(sparsities)
    except InfeasibleBudgetError:
        counts = FeasibleSet.build(structure, costs, Budget.parse("macs<=100%"), max_sparsity=0.95).upper
        row.remarks.append("half the MACs can't be reached; 95 % of every group goes")
    return {group.name: group.nearest(int(gone)) for group, gone in zip(structure, counts, strict=True)}


def _compare(
    row: Row,
    model: nn.Module,
    smaller: nn.Module,
    structure: Structure,
    removed: Mapping[str, Sequence[int]],
    example_input: Any,
) -> None:
    """Compare the smaller network with the dense one whose weights are zero where removed elements are read."""
    generator = torch.Generator().manual_seed(1)
    for dtype in TOLERANCE:

        def random(tensor: torch.Tensor, dtype: torch.dtype = dtype) -> torch.Tensor:
            if not tensor.is_floating_point():
                return tensor
            return torch.randn((max(2, len(tensor)), *tensor.shape[1:]), generator=generator, dtype=dtype)

        inputs = each_tensor(example_input, random)
        try:
            outputs = _outputs(smaller.to(dtype), inputs)
            expected = _outputs(model.to(dtype), inputs, _zeroed(model, structure, removed))
            break
        except RuntimeError:
            if dtype == torch.float32:
                raise
    row.precision = str(dtype).removeprefix("torch.")
    row.difference = 0.0
    spread = 0.0
    for output, reference in zip(outputs, expected, strict=True):
        if output.shape != reference.shape:
            row.faults.append(f"an output is {tuple(output.shape)}, of the dense network {tuple(reference.shape)}")
            return
        own = float((reference[0] - reference[1]).abs().max()) if reference.dim() else 0.0
        spread = max(spread, own)
        row.difference = max(row.difference, float((output - reference).abs().max()) / max(own, 1e-300))
    if not spread > 0:
        row.faults.append("the masked network's output does not depend on its input, so that it proves nothing")
    elif not row.difference <= TOLERANCE[dtype]:
        row.faults.append(f"differs from the masked network by {row.difference:.0e}")


def _zeroed(model: nn.Module, structure: Structure, removed: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """Return the weights that read removed elements with zeros there; those that write, where nothing reads."""
    parameters = dict(model.named_parameters())
    zeroed: dict[str, torch.Tensor] = {}
    for group in structure:
        read = [part for part in group.slices if part.role == "read"]
        for part in read or [part for part in group.slices if part.tensor in parameters]:
            gone = part.positions[torch.as_tensor(removed[group.name], dtype=torch.int64)].flatten()
            weight = zeroed.get(part.tensor, parameters[part.tensor].detach())
            zeroed[part.tensor] = weight.index_fill(part.dim, gone, 0.0)
    return zeroed


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Any, replaced: Mapping[str, torch.Tensor] | None = None) -> list[torch.Tensor]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(model, dict(replaced or {}), args, kwargs)

    return _tensors(call(run, inputs))


def _share(model: nn.Module, example_input: Any, structure: Structure) -> tuple[float, list[str]]:
    """Return which share of the parameters of layers that run is sliced by a group, and the largest that are not."""
    layers = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)
    ran = {weight.rpartition(".")[0] for weight in count(model, example_input).macs_of}
    touched = {part.tensor for group in structure for part in group.slices}
    reasons = {layer: group.reason for group in structure.locked for layer in group.layers}
    sizes: Counter[bool] = Counter()
    uncovered: Counter[str] = Counter()
    for name, module in model.named_modules():
        if not isinstance(module, layers) or name not in ran:
            continue
        for own, parameter in module.named_parameters(name, recurse=False):
            sizes[own in touched] += parameter.numel()
            if own not in touched:
                uncovered[name] += parameter.numel()
    in_the_way = [f"{name}: {reasons.get(name, 'in no group')}" for name, _ in uncovered.most_common(5)]
    return round(sizes[True] / max(1, sizes.total()), 4), in_the_way


def _onnx(model: nn.Module, example_input: Any, row: Row) -> str:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AutopruneWarning)
        try:
            to_onnx(model, Path(folder) / "network.onnx", example_input)
        except ConfigError:  # packages are missing, which is no fault of the network
            raise
        except Exception as error:
            row.faults.append(f"ONNX: {_one_line(error)}")
            return _one_line(error)
    if any(issubclass(warning.category, AutopruneWarning) for warning in caught):
        row.remarks.append("ONNX with a fixed batch size")
    return "equal"


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _one_line(error: BaseException) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {first}"


def _where(error: BaseException) -> str:
    """Return the last function of this script that an error passed, and the last of the package."""
    passed = traceback.extract_tb(error.__traceback__)
    script = [frame.name for frame in passed if frame.filename == __file__]
    package = [frame.name for frame in passed if "autoprune" in Path(frame.filename).parts]
    return ", ".join(script[-1:] + package[-1:])


def _peak_mb() -> int:
    """Return the most memory that this process has held, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KB, but on a Mac bytes
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


# -- making networks --------------------------------------------------------------------------------------------------


def build(source: str, shape: Sequence[int] | None = None, seed: int = 0) -> tuple[nn.Module, Any]:
    """Make a network with random weights and the smallest input that it runs on.

    Args:
        source: `torchvision:NAME`, `timm:NAME` or `FILE.py:FUNCTION`.
        shape: Of the input, where it is known.
        seed: Randomness of weights and input.
    """
    torch.manual_seed(seed)
    where, _, name = source.rpartition(":")
    example_input = None
    fixed: Sequence[int] | None = None
    if where == "torchvision":
        import torchvision

        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}  # slow, and not needed
        model = torchvision.models.get_model(name, weights=None, **options)
    elif where == "timm":
        import timm

        model = timm.create_model(name, pretrained=False)
        fixed = (2, *model.default_cfg["input_size"])
    else:
        made = _function(Path(where), name)()
        model, example_input = made if isinstance(made, tuple) else (made, None)
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    if example_input is None:
        shapes = [shape] if shape else [(2, 3, size, size) for size in SIZES] + ([fixed] if fixed else [])
        example_input = _smallest(model, shapes, generator)
    _randomise(model, example_input, generator)
    return model, example_input


def _function(file: Path, name: str) -> Callable[[], Any]:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file} is no Python file; write --build FILE.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise SystemExit(f"{file} has no function '{name}'")
    function: Callable[[], Any] = getattr(module, name)
    return function


def _smallest(model: nn.Module, shapes: Sequence[Sequence[int]], generator: torch.Generator) -> torch.Tensor:
    reason = ""
    for shape in shapes:
        example_input = torch.randn(tuple(shape), generator=generator)
        try:
            with torch.no_grad():
                model(example_input)
        except Exception as error:  # whatever the network's code raises on an input that it does not take
            reason = _one_line(error)
        else:
            return example_input
    raise RuntimeError(f"it runs on no input of {[list(shape) for shape in shapes]}: {reason}")


@torch.no_grad()
def _randomise(model: nn.Module, example_input: Any, generator: torch.Generator) -> None:
    """Give constant parameters random values, and batch-norms the statistics of random inputs, moved at random."""
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1 and parameter.is_floating_point() and parameter.min() == parameter.max():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / max(1, parameter[0].numel()) ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(1 + 0.2 * noise.clamp(-3, 3))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()

    def several(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or not tensor.dim():
            return tensor
        return torch.randn((8, *tensor.shape[1:]), generator=generator, dtype=tensor.dtype)

    if norms:
        with suppress(ValueError):  # a norm of one value a channel keeps its statistics
            call(model, each_tensor(example_input, several))
    for norm, (momentum, training) in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.train(training)
        mean, variance = norm.running_mean, norm.running_var
        mean.add_(0.1 * variance.sqrt() * torch.randn(mean.shape, generator=generator))
        variance.mul_(torch.rand(mean.shape, generator=generator) + 0.5).clamp_(min=1e-3)


# -- the walk ---------------------------------------------------------------------------------------------------------


def sources(options: argparse.Namespace) -> dict[str, str]:
    """Return what to walk: the row's name → what `build` takes."""
    if options.build:
        return {options.build: options.build}
    if options.timm:
        every = {name: f"timm:{name}" for name in TIMM}
    else:
        import torchvision

        every = {name: f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models)}
    if not options.only:
        return every
    names = options.only.split(",")
    unknown = [name for name in names if name not in every]
    if unknown and not options.timm:
        raise SystemExit(f"no network '{unknown[0]}'; there are {', '.join(every)}")
    return {name: every.get(name, f"timm:{name}") for name in names}


def in_own_process(name: str, source: str, options: argparse.Namespace) -> Row:
    """Return a network's row from a fresh process; what kills the process or takes too long is a row, too."""
    command = [sys.executable, str(Path(__file__).resolve()), "--row", name, "--source", source]
    command += ["--seed", str(options.seed)] + ["--no-onnx"] * (not options.onnx)
    command += ["--shape", ",".join(map(str, options.shape))] if options.shape else []
    settings = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    started = time.monotonic()
    row = Row(name)
    try:
        done = subprocess.run(
            command,
            env=os.environ | settings,
            capture_output=True,
            text=True,
            timeout=options.limit_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        row.faults.append(f"took more than {options.limit_seconds} s")
    else:
        lines = done.stdout.splitlines()
        if done.returncode == 0 and lines:
            return Row(**json.loads(lines[-1]))
        last = next(reversed(done.stderr.strip().splitlines()), "")
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        row.faults.append(f"the process ended with {ended}: {last}")
    row.seconds = round(time.monotonic() - started, 2)
    return row


def one_row(options: argparse.Namespace) -> Row:
    """Return a network's row, made in this process."""
    torch.set_num_threads(1)
    try:
        model, example_input = build(options.source, options.shape, options.seed)
    except Exception as error:  # its own code failed: that is the row
        return Row(options.row, faults=[f"can't be built: {_one_line(error)}"])
    return examine(options.row, model, example_input, onnx=options.onnx, seed=options.seed)


def line_of(row: Row) -> str:
    """Return a row as one line for a person."""
    share = "" if row.share is None else f"{row.share:6.1%}"
    difference = "" if row.difference is None else f"{row.difference:.0e}"
    faults = "; ".join([*row.faults, *row.remarks])[:200]
    offered = sum(row.offered.values())
    onnx = "-" if row.onnx is None else "equal" if row.onnx == "equal" else "no"
    return (
        f"{row.name:24} {_input(row):>10} {row.parameters / 1e6:7.1f} M  {row.found:4d} found {offered:4d}"
        f" offered {len(row.locked):3d} locked {share:>7} covered  {row.macs or 0:6.1%} MACs  {difference:>6}  "
        f"onnx {onnx:5} "
        f"{row.analysis_seconds or 0:6.1f} s of {row.seconds or 0:6.1f} s  {row.analysis_peak_mb or 0:6,d} MB  "
        f"{'passed' if not row.faults else 'FAILED'} {faults}"
    )


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| network | input | parameters | groups: offered / locked | covered | MACs left | against masked | cost by "
        "formula | ONNX | analysis s | all s | analysis peak MB | what is in the way |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row.name,
            _input(row),
            f"{row.parameters / 1e6:.1f} M",
            f"{sum(row.offered.values())} / {len(row.locked)}",
            "" if row.share is None else f"{row.share:.1%}",
            "" if row.macs is None else f"{row.macs:.1%}",
            "" if row.difference is None else f"{row.difference:.0e}",
            "" if not row.counted else "equal" if row.formula == row.counted else "differs",
            "" if row.onnx is None else "equal" if row.onnx == "equal" else "fails",
            "" if row.analysis_seconds is None else f"{row.analysis_seconds:.1f}",
            "" if row.seconds is None else f"{row.seconds:.1f}",
            "" if row.analysis_peak_mb is None else f"{row.analysis_peak_mb:,}",
            "; ".join([*row.faults, *row.remarks, *_in_the_way(row)]).replace("|", "\\|"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", total_of(rows)])


def total_of(rows: Sequence[Row]) -> str:
    """Return the last line: how many passed, and how many are covered."""
    passed = sum(not row.faults for row in rows)
    covered = sum((row.share or 0) >= COVERED for row in rows)
    seconds = sum(row.seconds or 0 for row in rows)
    return (
        f"{passed} of {len(rows)} passed; {covered} of {len(rows)} covered to {COVERED:.0%} or more; {seconds:,.0f} s"
    )


def _input(row: Row) -> str:
    return ", ".join("×".join(map(str, shape)) for shape in row.input)


def _in_the_way(row: Row) -> list[str]:
    return row.in_the_way[:2] + row.given_up[:1] if (row.share or 0) < COVERED else []


def main() -> None:
    """Walk, print a line for each network and the total, and write the files that are asked for."""
    options = _options()
    if options.row:
        print(json.dumps(asdict(one_row(options))))
        return
    every = sources(options)
    rows: dict[str, Row] = {}
    if options.resume and options.json and options.json.exists():
        kept = [Row(**row) for row in json.loads(options.json.read_text())["rows"]]
        rows = {row.name: row for row in kept if not (options.only and row.name in every)}
    todo = {name: source for name, source in every.items() if name not in rows}

    def run(item: tuple[str, str]) -> Row:
        row = in_own_process(*item, options)
        print(line_of(row), flush=True)
        return row

    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(run, todo.items()):
            rows[row.name] = row
            _write(options, list(rows.values()))
    ordered = sorted(rows.values(), key=lambda row: row.name)
    _write(options, ordered)
    print(total_of(ordered))
    sys.exit(any(row.faults for row in ordered))


def _write(options: argparse.Namespace, rows: Sequence[Row]) -> None:
    if options.json:
        document = {
            "machine": {"python": platform.python_version(), "torch": torch.__version__, "threads": 1},
            "settings": {key: str(value) for key, value in vars(options).items() if key not in ("row", "source")},
            "total": total_of(rows),
            "rows": [asdict(row) for row in rows],
        }
        partial = options.json.with_suffix(".partial")
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(options.json)
    if options.markdown:
        options.markdown.write_text(table(rows) + "\n")


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME,NAME", help="these networks only")
    parser.add_argument("--build", metavar="FILE.py:FUNCTION", help="a network of your own")
    parser.add_argument(
        "--shape", type=_shape, metavar="1,3,224,224", help="of the input; found by trying if not given"
    )
    parser.add_argument(
        "--timm", action="store_true", help="thirty architectures of timm: pip install 'autoprune[zoo]'"
    )
    parser.add_argument("--no-onnx", dest="onnx", action="store_false")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once, of one thread each")
    parser.add_argument("--limit-seconds", type=int, default=1800, help="for one network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the JSON file has")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # the process of one network
    parser.add_argument("--source", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
