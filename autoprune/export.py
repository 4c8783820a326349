"""The pruned network on disk: weights, a recipe that rebuilds the architecture, and a program that needs no class.

A saved network is a folder of `model.safetensors`, `recipe.json` and `program.pt2` (torch.export). Nothing in it is a
pickle of code. `save` proves that what it wrote loads and computes the same before it returns.
"""

import importlib.metadata
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from autoprune import models
from autoprune.data import isolated_rng
from autoprune.errors import AutopruneWarning, ConfigError, RunError, WeightsError
from autoprune.run import RunFolder, write_json
from autoprune.structure import Kept, select

__all__ = ["PROGRAM", "RECIPE", "WEIGHTS", "load", "recipe_of", "save"]

WEIGHTS: Final = "model.safetensors"
RECIPE: Final = "recipe.json"
PROGRAM: Final = "program.pt2"
_FORMAT: Final = 1


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    dense: nn.Module,
    kept: Kept,
    example_input: torch.Tensor,
    measured: Mapping[str, Any],
) -> Path:
    """Write a pruned network, and prove that it loads to the same outputs.

    Args:
        model: The pruned network.
        folder: Is made; files of an earlier save in it are replaced.
        dense: The network that it was sliced from.
        kept: What was kept of which tensor (see `autoprune.structure.kept_indices`).
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
        "kept": {tensor: {str(dim): i.tolist() for dim, i in dims.items()} for tensor, dims in sorted(kept.items())},
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
    kept = {
        tensor: {int(dim): torch.tensor(indices, dtype=torch.int64) for dim, indices in dims.items()}
        for tensor, dims in recipe["kept"].items()
    }
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder / WEIGHTS} can't be read ({error}); save the network again") from error
    try:
        model = select(dense, kept)
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
    inputs = torch.cat([example_input, example_input]).contiguous()
    dynamic = {0: torch.export.Dim("batch", min=1)}
    path.unlink(missing_ok=True)
    try:
        plain = select(model.eval(), {}).cpu()
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
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@torch.no_grad()
def _prove(model: nn.Module, other: nn.Module, example_input: torch.Tensor, which: str) -> None:
    device = next(iter(model.parameters())).device
    expected = model.eval()(example_input.to(device)).cpu()
    difference = float((other(example_input.cpu()) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not difference <= 1e-4:
        raise RunError(
            f"the {which} network differs from the one that was saved by {difference:.1e}; nothing was handed back"
        )
