"""All that needs no gradient, on a device that is none: real numbers, in tensors that say they are on cuda:0.

Where they meet tensors of the CPU, it raises what CUDA would: a forgotten `.to(device)` fails without a GPU, too.
Gradients can't be pretended: torch's engine asks for the device itself.
"""

import contextlib
import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from autoprune import data, export, models
from autoprune.cost import CostModel, LatencyTable, compare, count
from autoprune.evaluation import Pipeline, Precision, Recovery, workbench
from autoprune.finetuning import reconstruct
from autoprune.moments import Moments, influences, readers_of
from autoprune.policy import Policy
from autoprune.preparation import prepare
from autoprune.result import open_run
from autoprune.scoring.l1 import L1
from autoprune.search import search
from autoprune.settings import SearchSettings
from autoprune.structure import Structure, analyse, cut, plan
from autoprune.task import Task
from autoprune.tracking import NullTracker

DEVICE = torch.device("cuda:0")
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}


class There(torch.Tensor):
    """Numbers on the device; `inner` holds them."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "There":
        made: There = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]  # torch's own
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )
        made.inner = inner
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            new: torch.Tensor = There(self.inner.clone())
            memo[id(self)] = nn.Parameter(new, self.requires_grad) if isinstance(self, nn.Parameter) else new
        copied: torch.Tensor = memo[id(self)]
        return copied

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy, or pickle it")

    numpy = __array__ = __reduce_ex__ = _refuse  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator on the numbers, and refuse what CUDA would refuse."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    here = [tensor for tensor in tensors if not isinstance(tensor, There)]
    target = kwargs.get("device")
    if func in INDEXED:
        if there and not isinstance(args[0], There):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    elif func not in COPIES and there and any(tensor.dim() for tensor in here):
        raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
    if target is None:
        goes_there = isinstance(args[0], There) if func in COPIES else bool(there)
    else:
        goes_there, kwargs = torch.device(target).type == "cuda", {**kwargs, "device": torch.device("cpu")}
    known = {id(tensor.inner): tensor for tensor in there}
    args, kwargs = tree_map(lambda leaf: leaf.inner if isinstance(leaf, There) else leaf, (args, kwargs))
    if func is aten.cudnn_batch_norm.default:
        result = (*aten.native_batch_norm.default(*args, **kwargs), torch.empty(0, dtype=torch.uint8))
    else:
        result = func(*args, **kwargs)

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, There):
            return leaf
        if id(leaf) in known:
            return known[id(leaf)] if goes_there else leaf.clone()
        return There(leaf) if goes_there else leaf

    return tree_map(wrapped, result)


class Everywhere(TorchDispatchMode):
    """Lets operators that name the device make tensors there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Event:
    """Notes what is recorded and waited for."""

    log: ClassVar[list[str]] = []

    def record(self, stream: object) -> None:
        self.log.append("sent")

    def synchronize(self) -> None:
        self.log.append("waited")


class Locked(torch.Tensor):
    """Numbers in memory that says it is page-locked."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> torch.Tensor:
        Event.log.append("locked")
        return tensor.clone().as_subclass(cls)

    def is_pinned(self, device: object = None) -> bool:
        return True

    def to(self, *args: Any, non_blocking: bool = False, **kwargs: Any) -> Any:
        Event.log.append("copying" if non_blocking else "copied")
        return self.as_subclass(torch.Tensor).to(*args, non_blocking=non_blocking, **kwargs)


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Pretend that there is one CUDA device."""
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]  # as fake tensors do
    instead: dict[str, Any] = {
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.current_stream": lambda device: None,
        "torch.cuda.get_device_name": lambda device: "pretended",
        "torch.cuda.get_rng_state": lambda device: None,
        "torch.cuda.set_rng_state": lambda state, device: None,
        "torch.cuda.Event": Event,
        "torch.accelerator.synchronize": lambda device: None,
        "torch.Tensor.pin_memory": lambda tensor: Locked.of(tensor),
    }
    overwriting = torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for name, function in instead.items():
            stack.enter_context(mock.patch(name, function))
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwriting)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(Everywhere())  # type: ignore[no-untyped-call]
        yield


def influences_elsewhere(model: nn.Module, batches: Any, weights: Any, seed: int) -> dict[str, torch.Tensor]:
    """Return `influences`, which needs a gradient, computed on the CPU."""
    plain = copy.deepcopy(model).cpu()
    found = influences(plain, [(inputs.cpu(), targets.cpu()) for inputs, targets in batches], weights, seed)
    device = next(model.parameters()).device
    return {name: values.to(device) for name, values in found.items()}


@pytest.fixture(scope="module")
def task() -> Task:
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(300, 1, 8, 8, generator=generator), torch.arange(300) % 4
    splits: dict[str, Any] = {name: (images[s], targets[s]) for name, s in PARTS.items()}
    model = models.build("resnet8", num_classes=4, in_channels=1, input_size=8)
    return Task(model, **splits, augment=data.RandomShift(1))


PARTS = {"train": slice(0, 160), "val": slice(160, 260), "test": slice(260, 300)}


@pytest.fixture(scope="module")
def structure(task: Task) -> Structure:
    return analyse(task.model, task.example_input)


def test_what_cuda_refuses_is_refused() -> None:
    with pretended():
        there = torch.arange(4.0).to(DEVICE)
        assert (there.device, (there + 1).sum().item()) == (DEVICE, 10)
        assert there[torch.tensor([1])].tolist() == [1]  # an index may be on the CPU
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.arange(4.0)
        with pytest.raises(RuntimeError, match="indices should be"):
            torch.arange(4.0)[there.long()]
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


@pytest.mark.parametrize("name", ["resnet8", pytest.param("torchvision:swin_t", marks=pytest.mark.torture)])
def test_structure_and_costs_are_those_of_the_cpu(name: str) -> None:
    """Through cuDNN's operators, which are others."""
    model, example = models.build(name, in_channels=3, input_size=32).eval(), torch.rand(1, 3, 32, 32)
    expected = analyse(model, example, kinds=("channels", "heads", "blocks"))
    with pretended():
        there, given = copy.deepcopy(model).to(DEVICE), example.to(DEVICE)
        found = analyse(there, given, kinds=("channels", "heads", "blocks"))
        assert (found.names, found.locked, found.given_up) == (expected.names, expected.locked, expected.given_up)
        counted = count(there, given)
        assert (counted.cost, counted.unknown) == (count(model, example).cost, {})
        assert CostModel(there, given, found).dense == counted.cost


def losses(task: Task, criterion: str, rung: str, units: tuple[str, ...], race: bool) -> list[float]:
    """Return what a candidate, the dense network and two probes lose."""
    limit = "macs<=50%" if units[0] == "channels" else "nonzero_params<=50%"
    given: dict[str, Any] = {"criterion": criterion, "recover": rung, "units": units, "race": race}
    prepared = prepare(task, SearchSettings(budget=limit, calibration_images=100, **given))
    names, bench = prepared.structure.names, prepared.bench
    counts = prepared.feasible.project(prepared.feasible.upper * 0.5)
    samples = [bench.measure(bench.recovered(dict(zip(names, map(int, counts), strict=True)))), bench.dense]
    samples += [bench.probe({name: 3}) for name in names[1:3]]
    return [one.summary(rung).loss for one in samples]


@pytest.mark.parametrize(
    ("criterion", "rung", "units", "race"),
    [
        ("l1", "reconstructed", ("channels",), False),
        ("random", "recalibrated", ("channels", "2:4"), True),
        ("obs", "reconstructed", ("weights",), False),
        ("l2", "reconstructed", ("4x4",), True),
        ("identity", "recalibrated", ("channels", "blocks"), False),
    ],
)
def test_candidates_and_probes_are_those_of_the_cpu(
    task: Task, criterion: str, rung: str, units: tuple[str, ...], race: bool
) -> None:
    expected = losses(task, criterion, rung, units, race)
    with pretended():
        assert losses(task.on(DEVICE), criterion, rung, units, race) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("race", [False, True])
def test_what_is_mapped_from_a_file_is_sent_batch_by_batch(
    task: Task, race: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: tuple[Any, ...] = ("l1", "reconstructed", ("channels",), race)
    expected = losses(task, *given)
    monkeypatch.setattr(workbench, "_IN_MEMORY", 0)
    with pretended():
        Event.log.clear()
        assert losses(task.on(DEVICE), *given) == pytest.approx(expected, abs=1e-6)
    passes = 1 + 2 + 2 * 2  # what layers are fitted on; two networks; two probes, from two cut points
    assert Event.log == ["locked", "copying", "locked", "copying", "sent"] * passes


def test_moments_are_read_onto_the_device_and_layers_solved_from_them(
    task: Task, structure: Structure, tmp_path: Path
) -> None:
    model = task.fresh_model().eval()
    Moments.collect(model, task.calibration_batches(60, 30, 0), readers_of(structure)).save(tmp_path / "moments", {})
    change = plan(model, structure, {structure.names[0]: [0, 1, 2]})
    expected = cut(model, change)
    reconstruct(model, expected, change, Moments.load(tmp_path / "moments", {}))
    with pretended():
        there = copy.deepcopy(model).to(DEVICE)
        smaller = cut(there, change)
        reconstruct(there, smaller, change, Moments.load(tmp_path / "moments", {}, DEVICE))
        Moments.load(tmp_path / "moments", {}, DEVICE).save(tmp_path / "again", {})
        for name, tensor in smaller.state_dict().items():
            torch.testing.assert_close(tensor.cpu(), expected.state_dict()[name])
    assert Moments.load(tmp_path / "again", {}).keys() == Moments.load(tmp_path / "moments", {}).keys()


def test_elements_may_be_named_by_a_tensor_there(task: Task, structure: Structure) -> None:
    with pretended():
        change = plan(task.on(DEVICE).model, structure, {structure.names[0]: torch.tensor([0, 2]).to(DEVICE)})
    assert change.to_dict() == plan(task.model, structure, {structure.names[0]: [0, 2]}).to_dict()


def test_latency_is_measured_there(task: Task, structure: Structure) -> None:
    with pretended():
        there = task.on(DEVICE)
        costs = CostModel(there.model, there.example_input, structure)
        table = LatencyTable.measure(there.model, there.example_input, structure, costs, seconds=0.1, repeats=3)
        assert table.dense.device == "cuda: pretended"
        assert compare({"": there.model}, there.example_input, repeats=2)[""].median_ms > 0


def test_a_pipeline_is_sent_without_the_device(task: Task) -> None:
    """To a worker without one, whose results are the same."""
    policy = {}
    with pretended():
        prepared = prepare(task.on(DEVICE), SearchSettings(criterion="obs", calibration_images=60, units=("2:4",)))
        policy = {prepared.structure.names[1]: 0.5}
        pipeline = Pipeline(prepared.bench, Recovery(60), 0)
        expected = pipeline(Policy(policy))
        sent = pickle.dumps(pipeline)
    there: Pipeline = pickle.loads(sent)
    assert there.device == torch.device("cpu")
    (found,), (here,) = there(Policy(policy)).measurements, expected.measurements
    assert found.loss == pytest.approx(here.loss, abs=1e-6)


def test_data_on_the_device_is_sent_without_it() -> None:
    with pretended():
        split = data.TensorSplit(torch.rand(3, 2).to(DEVICE), torch.arange(3).to(DEVICE))
        sent = pickle.dumps(split)
        assert pickle.loads(sent).digest() == split.digest()
    assert pickle.loads(sent).inputs.device == torch.device("cpu")


def test_batches_are_on_their_way_two_at_a_time_and_in_order() -> None:
    def batches() -> Iterator[data.Batch]:
        for number in range(4):
            Event.log.append(f"read {number}")
            yield torch.full((1, 2, 3, 3), float(number)), torch.tensor([number])
        raise OSError("the disk is gone")

    Event.log.clear()
    seen: list[tuple[float, float]] = []

    def take_all() -> None:
        for inputs, targets in Precision("float32", True).placed(batches(), DEVICE):
            assert (inputs.device, targets.device) == (DEVICE, DEVICE)
            seen.append((inputs.max().item(), targets.item()))

    with pretended(), pytest.raises(OSError, match="the disk is gone"):
        take_all()
    assert seen == [(number, number) for number in range(4)]
    on_its_way = ["locked", "copying", "locked", "copying", "sent"]  # inputs, then targets; nobody waits for them
    assert Event.log[:12] == ["read 0", *on_its_way, "read 1", *on_its_way]
    assert Event.log[12:] == ["read 2", "waited", *on_its_way, "read 3", "waited", *on_its_way]


def test_what_is_there_already_is_not_sent() -> None:
    Event.log.clear()
    with pretended():
        batch = torch.ones(1, 2, 3, 3).to(DEVICE), torch.zeros(1).to(DEVICE)
        ((inputs, targets),) = Precision("float32", True).placed([batch], DEVICE)
        assert inputs.is_contiguous(memory_format=torch.channels_last)
        assert targets is batch[1]
    assert Event.log == []


def accuracies(run: Any) -> list[tuple[str, float]]:
    return [(candidate.id, candidate.accuracy) for candidate in run.candidates]


def test_a_whole_search_is_that_of_the_cpu_and_goes_on_there(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoprune.preparation.influences", influences_elsewhere)
    settings: dict[str, Any] = {"budget": "macs<=50%", "candidates": 4, "control": 1, "calibration_images": 60}
    settings |= {"agent": "random", "sensitivity": (), "tracker": NullTracker()}
    expected = search(task, out=tmp_path / "here", **settings)
    with pretended():
        found = search(task.on(DEVICE), out=tmp_path / "there", **settings)
        assert accuracies(found) == accuracies(expected)
        picked = found.pick()
        picked.save(tmp_path / "saved")
        assert picked.model.get_parameter("conv1.weight").device == DEVICE
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {export.WEIGHTS, export.RECIPE, export.PROGRAM}
    again = open_run(tmp_path / "there", task)
    assert accuracies(again) == accuracies(found)
    assert again.pick().accuracy == picked.accuracy
    more = search(task, out=tmp_path / "there", **settings)
    assert accuracies(more) == accuracies(found)


def test_criteria_score_what_is_there(task: Task, structure: Structure) -> None:
    expected = L1().score(task.model, structure, None)  # type: ignore[arg-type]  # it looks at no evidence
    with pretended():
        found = L1().score(task.on(DEVICE).model, structure, None)  # type: ignore[arg-type]
        for name, scores in expected.items():
            torch.testing.assert_close(found[name].cpu(), scores)
