"""The pruned network on disk: weights, a recipe that rebuilds the architecture, and a program that needs no class.

A saved network is a folder of `model.safetensors`, `recipe.json` and `program.pt2` (torch.export). Nothing in it is a
pickle of code. `save` proves that what it wrote loads and computes the same before it returns, and so does `to_onnx`,
for runtimes other than PyTorch.
"""

import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten

from autoprune import models
from autoprune.data import isolated_rng
from autoprune.errors import AutopruneWarning, ConfigError, RunError, WeightsError
from autoprune.inputs import call, each_tensor
from autoprune.run import RunFolder, write_json
from autoprune.structure import Cut, cut

__all__ = ["PROGRAM", "RECIPE", "WEIGHTS", "load", "recipe_of", "save", "to_onnx"]

WEIGHTS: Final = "model.safetensors"
RECIPE: Final = "recipe.json"
PROGRAM: Final = "program.pt2"
_FORMAT: Final = 2


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    dense: nn.Module,
    change: Cut,
    example_input: torch.Tensor,
    measured: Mapping[str, Any],
) -> Path:
    """Write a pruned network, and prove that it loads to the same outputs.

    Args:
        model: The pruned network.
        folder: Is made; files of an earlier save in it are replaced.
        dense: The network that it was sliced from.
        change: What differs from the dense network (see `autoprune.structure.plan`).
        example_input: `(1, ...)`.
        measured: What goes into the recipe beside the architecture: policy, accuracy, cost.

    Raises:
        RunError: The folder can't be written, or the saved network does not compute what the given one does.
    """
    folder = Path(folder)
    RunFolder(folder).create()
    spec = models.spec_of(dense)
    if spec is not None and repr(_built(spec)) != repr(dense):
        spec = None  # it was changed since it was built, so its name does not rebuild it
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    document = {
        "format": _FORMAT,
        "model": spec.to_dict() if spec else None,
        "class": f"{type(dense).__module__}.{type(dense).__qualname__}",
        "input": {"shape": list(example_input.shape), "dtype": str(example_input.dtype).removeprefix("torch.")},
        "measured": dict(measured),
        "cut": change.to_dict(),
        "versions": {"autoprune": importlib.metadata.version("autoprune"), "torch": torch.__version__},
    }
    write_json(folder / RECIPE, document)
    _prove(model, load(folder, build=None if spec else lambda: dense), example_input, "reloaded")
    _save_program(model, folder / PROGRAM, example_input)
    return folder


def load(folder: str | Path, build: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Return a saved network, in eval mode, on the CPU.

    Args:
        folder: What `save` wrote.
        build: Makes the dense network of your own class, with any weights; a named network needs none.

    Raises:
        RunError: The folder is not a saved network, or a file of it can't be read.
        ConfigError: The network is of a class that only you can build, and `build` is not given.
        WeightsError: `build` makes another architecture.
    """
    folder = Path(folder)
    recipe = recipe_of(folder)
    if build is not None:
        with isolated_rng(0):  # its initial weights are thrown away
            dense = build()
    elif recipe["model"] is not None:
        dense = _built(models.ModelSpec.from_dict(recipe["model"]))
    else:
        raise ConfigError(
            f"{folder} holds a {recipe['class']}, which only your code can build: "
            f"load({str(folder)!r}, build=make_model), where make_model returns the dense network"
        )
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder / WEIGHTS} can't be read ({error}); save the network again") from error
    try:
        model = cut(dense, Cut.from_dict(recipe["cut"]))
        floating = next((t.dtype for t in state.values() if t.is_floating_point()), torch.get_default_dtype())
        model.to("cpu", floating).load_state_dict(state)
    except (AttributeError, IndexError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = lines[min(1, len(lines) - 1)] if lines else type(error).__name__
        raise WeightsError(
            f"the weights in {folder} don't fit a {type(dense).__name__}: {detail}; "
            "does `build` make the dense network?"
        ) from error
    return model.eval()


def recipe_of(folder: str | Path) -> dict[str, Any]:
    """Return a saved network's recipe.

    Raises:
        RunError: The folder has none, or one of another format.
    """
    if not (Path(folder) / RECIPE).is_file():
        raise RunError(
            f"{folder} has no {RECIPE}; name what `save` wrote, in a search's folder {RunFolder(folder).pruned.name}/"
        )
    recipe = RunFolder(folder).read(Path(folder) / RECIPE)
    if recipe.get("format") != _FORMAT:
        raise RunError(f"{Path(folder) / RECIPE} has format {recipe.get('format')}, but this version reads {_FORMAT}")
    return recipe


def _built(spec: models.ModelSpec) -> nn.Module:
    return models.build(**spec.to_dict())


def _save_program(model: nn.Module, path: Path, example_input: torch.Tensor) -> None:
    inputs = torch.cat([example_input, example_input]).contiguous().cpu()
    dynamic = {0: torch.export.Dim("batch", min=1)}
    path.unlink(missing_ok=True)
    try:
        plain = cut(model.eval(), Cut()).cpu()
        plain.to(memory_format=torch.contiguous_format)
        with _quiet():
            program = torch.export.export(plain, (inputs,), dynamic_shapes=(dynamic,))
            torch.export.save(program, path)
            _prove(model, torch.export.load(path).module(), example_input, "exported")
    except RunError:
        raise
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "no message")
        warnings.warn(
            f"no {PROGRAM} was written: torch.export can't trace the network: {type(error).__name__}: {first_line}",
            AutopruneWarning,
            stacklevel=4,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch.export warns, logs and prints of its own internals off the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@torch.no_grad()
def _prove(model: nn.Module, other: nn.Module, example_input: torch.Tensor, which: str) -> None:
    tensors = (*model.parameters(), *model.buffers())
    elsewhere = any(tensor.device.type != "cpu" for tensor in tensors)
    plain = (cut(model, Cut()).cpu() if elsewhere else model).eval()  # since devices round differently
    expected = plain(example_input.cpu())
    difference = float((other(example_input.cpu()) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not difference <= 1e-4:
        raise RunError(
            f"the {which} network differs from the one that was saved by {difference:.1e}; nothing was handed back"
        )


# -- ONNX -------------------------------------------------------------------------------------------------------------


def to_onnx(model: nn.Module, path: str | Path, example_input: Any) -> Path:
    """Write a network as an ONNX file, and prove with ONNX Runtime that it computes the same.

    The batch size is free where the exporters can follow it, else that of the example, with a warning. Inputs and
    outputs are called `input` and `output` where there is one, else by their keys or numbers.

    torch's older exporter goes first: it takes a tenth of the time of the one built on torch.export. As it records one
    run, it is passed over where the network's code asks for the value of a number in a tensor, as in
    `if features.mean() > 0`.

    Args:
        model: Any network; left as it was.
        path: The file; replaced if it is there. Weights of 2 GB or more go into files beside it.
        example_input: What the network runs on: a tensor `(batch, ...)`, a tuple or a mapping.

    Raises:
        ConfigError: The packages are missing.
        RunError: The network can't be written as ONNX, or the file differs by more than 1e-4 of the largest output
            (1e-2 in half precision); then there is no file.
    """
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'ONNX needs {" and ".join(missing)}; install with: pip install "autoprune[onnx]"')
    path = Path(path)
    plain = cut(model, Cut()).eval().cpu()
    plain.to(memory_format=torch.contiguous_format)
    one = each_tensor(example_input, lambda tensor: tensor.detach().cpu().contiguous())
    batch = next((tensor.shape[0] for tensor in _tensors(one) if tensor.dim()), 0)
    several = each_tensor(one, partial(_with_mirrored, batch=batch))
    exporters = (True,) if _reads_values(plain, one) else (False, True)
    faults = []
    for batch_is_free, dynamo in itertools.product((True, False), exporters):
        inputs = [one, several] if batch_is_free else [one]
        try:
            _write_onnx(plain, path, inputs[-1], batch=len(inputs) * batch if batch_is_free else 0, dynamo=dynamo)
            _prove_onnx(plain, path, inputs)
        except Exception as error:  # whatever the exporters and the runtime raise
            faults.append(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))
            path.unlink(missing_ok=True)
            continue
        if not batch_is_free:
            warnings.warn(f"{path} takes a batch of {batch} only: {faults[0]}", AutopruneWarning, stacklevel=2)
        return path
    raise RunError(f"the {type(model).__name__} can't be written as ONNX: {faults[-1]}; nothing was written")


class _Flat(nn.Module):
    """A network as a function of tensors, for exporters that know no other arguments and results."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.model = model
        self._leaves, self._form = tree_flatten(inputs)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self._leaves]
        return tuple(_tensors(call(self.model, tree_unflatten(leaves, self._form))))


class _ValueReads(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own has no types
    found: bool = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= function._schema.name == "aten::_local_scalar_dense"
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def _reads_values(model: nn.Module, inputs: Any) -> bool:
    with _ValueReads() as reads:  # type: ignore[no-untyped-call]
        call(model, inputs)
    found: bool = reads.found
    return found


def _with_mirrored(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """Return twice the batch, the second half mirrored along the last dimension, so that it holds other values."""
    if not tensor.dim() or tensor.shape[0] != batch:
        return tensor
    return torch.cat([tensor, tensor.flip(-1) if tensor.dim() > 1 else tensor])


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _names(values: Any, alone: str) -> list[str]:
    """Return a name for every tensor in the inputs or outputs."""
    paths = [key for key, leaf in tree_flatten_with_path(values)[0] if isinstance(leaf, torch.Tensor)]
    plain = ["".join(c if c.isalnum() else "_" for c in keystr(key)).strip("_") for key in paths]
    named = [name if name and not name[0].isdigit() else f"{alone}_{name}".rstrip("_") for name in plain]
    return [alone] if paths == [()] else named


@torch.no_grad()
def _write_onnx(model: nn.Module, path: Path, inputs: Any, *, batch: int, dynamo: bool) -> None:
    """Export; tensors that begin with `batch`, if it is not 0, get a free first dimension."""
    outputs = call(model, inputs)
    names, results = _names(inputs, "input"), _names(outputs, "output")
    named = zip(names + results, _tensors(inputs) + _tensors(outputs), strict=True)
    free = {name for name, tensor in named if batch and tensor.dim() and tensor.shape[0] == batch}
    options: dict[str, Any] = {"dynamo": dynamo, "input_names": names, "output_names": results}
    if dynamo:
        size = torch.export.Dim("batch", min=1)
        options["dynamic_shapes"] = (tuple({0: size} if name in free else None for name in names),)
        options["external_data"] = sum(t.numel() * t.element_size() for t in model.state_dict().values()) >= 2**31
    else:
        options["dynamic_axes"] = {name: {0: "batch"} for name in free}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused operators are not in ONNX
    try:
        with _quiet():
            torch.onnx.export(_Flat(model, inputs).eval(), tuple(_tensors(inputs)), path, **options)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@torch.no_grad()
def _prove_onnx(model: nn.Module, path: Path, several: Sequence[Any]) -> None:
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    taken = {given.name for given in session.get_inputs()}
    for inputs in several:
        named = zip(_names(inputs, "input"), _tensors(inputs), strict=True)
        found = session.run(None, {name: tensor.numpy() for name, tensor in named if name in taken})
        for output, reference in zip(found, _tensors(call(model, inputs)), strict=True):
            difference = float((torch.from_numpy(output).double() - reference.double()).abs().max())
            scale = float(reference.double().abs().max().clamp_min(1e-30))
            half = reference.dtype in (torch.float16, torch.bfloat16)
            if not difference <= scale * (1e-2 if half else 1e-4):
                raise RunError(f"what ONNX Runtime computes differs by {difference / scale:.1e}")
