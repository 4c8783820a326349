"""A task keeps its splits apart, seals its test set, never changes the model, refuses what can only fail later."""

import copy
import itertools
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from autoprune import models
from autoprune.data import DatasetSplit
from autoprune.errors import (
    ConfigError,
    SplitError,
    TaskError,
    TestSetError,
    UnknownNameError,
    WeightsError,
)
from autoprune.task import Task, cross_entropy, load_task, top1

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

Pair = tuple[Tensor, Tensor]


def samples(n: int, start: int = 0, classes: int = 3) -> Pair:
    """Sample i of (n, 1, 2, 2) holds i in every pixel; its class is i modulo `classes`."""
    numbers = torch.arange(start, start + n)
    return numbers.float().view(n, 1, 1, 1).expand(n, 1, 2, 2).clone(), numbers % classes


class Net(nn.Module):
    """A network that uses functional relu and has batch norm, which a careless check would change."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(1)
        self.linear = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(self.bn(x)).flatten(1))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return Net()


def numbers_in(batches: Iterator[Pair]) -> list[int]:
    return [int(x[0, 0, 0]) for inputs, _ in batches for x in inputs]


def one_line(error: pytest.ExceptionInfo[Any]) -> bool:
    return "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------- measures


def test_top1_and_cross_entropy_are_per_sample() -> None:
    outputs, targets = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    assert top1(outputs, targets).tolist() == [1.0, 0.0]
    expected = torch.tensor([torch.log1p(torch.tensor(-2.0).exp()), torch.tensor(2.0).log()])
    torch.testing.assert_close(cross_entropy(outputs, targets), expected)


# ------------------------------------------------------------------------------------------------------------- splits


@settings(max_examples=30, deadline=None)
@given(n=st.integers(4, 60), fraction=st.floats(0.1, 0.6), seed=st.integers(0, 2**31), form=st.integers(0, 2))
def test_validation_cut_from_train_never_overlaps_it(
    net: nn.Module, n: int, fraction: float, seed: int, form: int
) -> None:
    if round(n * fraction) == 0:
        return
    dataset = TensorDataset(*samples(n))
    train = (samples(n), Subset(dataset, range(n)), DataLoader(dataset, batch_size=3, shuffle=True))[form]

    def cut() -> Task:
        return Task(net, train=train, test=samples(5, n), val_fraction=fraction, split_seed=seed)

    task = cut()
    val = numbers_in(task.val_batches())
    rest = set(numbers_in(task.calibration_batches(4 * n, 1, 0)))
    assert len(val) == len(set(val)) == task.n_val == round(n * fraction)
    assert rest.isdisjoint(val)
    assert rest <= set(range(n))
    assert task.n_train + task.n_val == n
    assert numbers_in(cut().val_batches()) == val


@pytest.mark.parametrize("roles", [("train", "val"), ("train", "test"), ("val", "test")])
def test_overlapping_splits_are_refused_by_name(net: nn.Module, roles: tuple[str, str]) -> None:
    splits: dict[str, Any] = {"train": samples(20), "val": samples(20, 20), "test": samples(20, 40)}
    splits[roles[1]] = tuple(part[:10].clone() for part in splits[roles[0]])
    with pytest.raises(SplitError, match=f"{roles[0]} and {roles[1]} must not overlap, but share 10 samples") as error:
        Task(net, **splits)
    assert one_line(error)


def test_one_dataset_given_twice_is_refused(net: nn.Module) -> None:
    dataset = Subset(TensorDataset(*samples(20)), range(20))
    with pytest.raises(SplitError, match="train and val must not overlap, but share 20"):
        Task(net, train=dataset, val=DataLoader(dataset))


@pytest.mark.parametrize("role", ["train", "val", "test"])
def test_an_empty_split_is_refused_by_name(net: nn.Module, role: str) -> None:
    splits: dict[str, Any] = {"train": samples(20), "val": samples(20, 20), "test": samples(20, 40), role: samples(0)}
    with pytest.raises(SplitError, match=f"the {role} split is empty"):
        Task(net, **splits)


def test_a_task_without_training_data_is_refused(net: nn.Module) -> None:
    with pytest.raises(SplitError, match="there is no training data"):
        Task(net, train=None, val=samples(3))


class Broken(Dataset[Pair]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Pair:
        raise OSError("image\nmissing")


@pytest.mark.parametrize("role", ["train", "val"])
def test_data_that_fails_to_read_is_refused_by_name(net: nn.Module, role: str) -> None:
    splits: dict[str, Any] = {"train": samples(20), "val": samples(20, 20), role: Broken()}
    with pytest.raises(SplitError, match=f"the {role} split can't be read .*image missing") as error:
        Task(net, **splits)
    assert one_line(error)


def test_the_test_set_is_opened_once_and_by_the_finaliser_alone(net: nn.Module) -> None:
    task = Task(net, train=samples(20), test=samples(7, 20))
    assert task.n_test == 7
    with pytest.raises(TestSetError, match="sealed"):
        _ = task.test
    with pytest.raises(TestSetError, match="'agent' asks"):
        task.open_test("agent")
    assert numbers_in(task.open_test("finaliser").batches(4)) == list(range(20, 27))
    with pytest.raises(TestSetError, match="read already"):
        task.open_test("finaliser")
    assert task.n_test == 7
    with pytest.raises(TestSetError, match="has no test set"):
        Task(net, train=samples(20)).open_test("finaliser")


def test_a_task_that_is_sent_leaves_its_test_set_behind_and_a_copy_shares_it(net: nn.Module) -> None:
    task = Task(net, train=samples(20), test=samples(7, 20))
    sent = pickle.loads(pickle.dumps(task))
    assert sent.n_test == 7
    with pytest.raises(TestSetError, match="sent here without its test set"):
        sent.open_test("finaliser")
    with pytest.raises(TestSetError, match="sent here without its test set"):
        sent.require_test()
    task.require_test()
    task.without_test().require_test()  # where there is none, none will be read
    copied = copy.deepcopy(task)
    copied.open_test("finaliser")
    assert task.test_read
    with pytest.raises(TestSetError, match="read already"):
        task.require_test()


# ------------------------------------------------------------------------------------------------------------ batches


def shifted_by_noise(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs + 100 + torch.randint(100, (len(inputs), 1, 1, 1), generator=generator)


def take(batches: Iterator[Pair], count: int) -> list[Pair]:
    return list(itertools.islice(batches, count))


def test_training_batches_are_endless_full_and_the_same_for_a_seed(net: nn.Module) -> None:
    task = Task(net, train=samples(10), val=samples(3, 10), augment=shifted_by_noise)
    first, again, other = (take(task.train_batches(4, seed), 7) for seed in (1, 1, 2))
    assert [len(x) for x, _ in first] == [4] * 7
    assert all(torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in zip(first, again, strict=True))
    assert not all(torch.equal(x, x2) for (x, _), (x2, _) in zip(first, other, strict=True))
    one_pass = torch.cat([y for _, y in first[:2]])
    assert not torch.equal(one_pass, torch.cat([y for _, y in first[2:4]]))


def test_a_train_split_smaller_than_a_batch_still_gives_batches(net: nn.Module) -> None:
    task = Task(net, train=samples(3), val=samples(3, 3))
    assert [len(x) for x, _ in take(task.train_batches(8, 0), 2)] == [3, 3]


def test_augmentation_reaches_training_and_calibration_but_never_validation(net: nn.Module) -> None:
    task = Task(net, train=samples(20), augment=shifted_by_noise)
    assert min(numbers_in(iter(take(task.train_batches(6, 0), 3)))) >= 100
    assert min(numbers_in(task.calibration_batches(18, 6, 0))) >= 100
    assert max(numbers_in(task.val_batches())) < 20
    assert float(task.example_input.max()) < 20


@pytest.mark.parametrize(
    ("images", "sizes"), [(10, [4, 4, 2]), (8, [4, 4]), (9, [4, 4]), (1, []), (2, [2]), (30, [4] * 7 + [2])]
)
def test_calibration_reads_as_many_images_as_asked_and_no_lone_one(
    net: nn.Module, images: int, sizes: list[int]
) -> None:
    task = Task(net, train=samples(20), val=samples(3, 20))
    assert [len(x) for x, _ in task.calibration_batches(images, 4, 0)] == sizes
    first, again = (numbers_in(task.calibration_batches(images, 4, 0)) for _ in range(2))
    assert first == again


def test_the_given_loader_is_iterated_as_it_is(net: nn.Module) -> None:
    loader = DataLoader(TensorDataset(*samples(12)), batch_size=6)
    task = Task(net, train=loader, val=samples(3, 12))
    assert numbers_in(iter(take(task.train_batches(4, 0), 2))) == list(range(12))


# -------------------------------------------------------------------------------------------------------------- model


def test_the_model_is_kept_and_never_changed(net: nn.Module) -> None:
    before = {key: value.clone() for key, value in net.state_dict().items()}
    task = Task(net.train(), train=samples(20))
    assert task.model is net
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    copied = task.fresh_model()
    assert copied is not net
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in net.parameters()}


def test_on_its_own_device_it_is_itself_and_elsewhere_a_copy_with_the_same_seal(net: nn.Module) -> None:
    task = Task(net, train=samples(20), val=samples(9, 20), test=samples(7, 40))
    assert task.on("cpu") is task
    with pytest.raises(TaskError, match=r"^on meta the metric must return one number a sample, \(\d,\), but fails"):
        Task(net, train=samples(20), metric=lambda outputs, targets: top1(outputs.cpu(), targets.cpu())).on("meta")
    assert next(net.parameters()).device.type == "cpu"


def test_the_example_is_the_first_validation_sample_or_the_one_given(net: nn.Module) -> None:
    task = Task(net, train=samples(20), val=samples(3, 20))
    assert torch.equal(task.example_input, samples(1, 20)[0])
    given_one = torch.ones(5, 1, 2, 2)
    assert torch.equal(Task(net, train=samples(20), example_input=given_one).example_input, given_one[:1])


class OneOnly(nn.Module):
    """Made for one sample at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.reshape(1, -1)[:, :4])  # type: ignore[no-any-return]


class Returning(Net):
    """Returns what `make` makes of the right output."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(super().forward(x))


class Uncopiable(Net):
    def __deepcopy__(self, memo: object) -> "Uncopiable":
        raise RuntimeError("holds a file")


def floats(n: int, start: int = 0) -> Pair:
    inputs, targets = samples(n, start)
    return inputs, targets.float()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: "resnet20", {}, r"must be a torch.nn.Module, but got a str"),
        (Net, {"example_input": torch.zeros(1, 3, 8, 8)}, r"the example input of shape \(1, 3, 8, 8\), but fails \("),
        (Net, {"val": (torch.zeros(4, 2, 2, 2), torch.zeros(4).long()), "example_input": torch.zeros(1, 1, 2, 2)},
         r"validation inputs of shape \(4, 2, 2, 2\), but fails"),
        (Uncopiable, {}, r"can't be copied \(RuntimeError: holds a file\)"),
        (OneOnly, {}, r"validation inputs .* one row a sample, but returns \(1, 3\)"),
        (lambda: Returning(lambda out: out.mean()), {}, r"one row a sample, but returns \(\)"),
        (lambda: Returning(lambda out: (out, out)), {}, r"return a tensor, but returns a tuple"),
        (lambda: Returning(lambda out: out[:, :, None]), {}, r"outputs \(n, classes\), but got"),
        (lambda: Net(2), {}, r"targets must be 0 to 1 for a model of 2 outputs, but train holds 2; .*num_classes=3"),
        (Net, {"val": (samples(4, 50)[0], torch.tensor([0, 1, 2, 3]))}, r"but val holds 3"),
        (Net, {"val": (samples(4, 50)[0], torch.tensor([0, 1, 2, -1]))}, r"but val holds -1"),
        (Net, {"val": DatasetSplit(TensorDataset(samples(2, 50)[0], torch.tensor([0, 7])))}, r"but val holds 7"),
        (Net, {"train": DatasetSplit(TensorDataset(samples(2, 50)[0], torch.tensor([0, 7])))}, r"but train holds 7"),
        (Net, {"train": floats(20)}, r"class numbers, \(n,\) of int64, but train has \(20,\) of torch.float32"),
        (Net, {"metric": lambda out, y: (out.argmax(1) == y).float().mean()},
         r"the metric must return one number a sample, \(8,\), but returns \(\)"),
        (Net, {"loss": lambda out, y: float(F.cross_entropy(out, y))}, r"the loss .* but returns float"),
        (Net, {"loss": lambda out, y: out @ y}, r"the loss .* but fails \(RuntimeError"),
    ],
)  # fmt: skip
def test_what_can_only_fail_later_is_refused_now(
    make: Callable[[], Any], options: dict[str, Any], message: str
) -> None:
    with torch.random.fork_rng(devices=[]):
        model = make()
    splits = {"train": samples(20), "val": samples(20, 50)} | options
    with pytest.raises(TaskError, match=message) as error:
        Task(model, **splits)
    assert one_line(error)


def test_a_batch_size_below_one_is_refused(net: nn.Module) -> None:
    with pytest.raises(ConfigError, match="`batch_size >= 1`"):
        Task(net, train=samples(20), batch_size=0)


def test_other_measures_may_have_other_targets() -> None:
    def squared(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets).square()

    with torch.random.fork_rng(devices=[]):
        net = Net(1)
    task = Task(net, train=floats(20), metric=lambda out, y: (-squared(out, y)).exp(), loss=squared)
    assert task.n_val == 2
    with pytest.raises(TaskError, match=r"the metric must lie in \[0, 1\], higher being better, but returns -"):
        Task(net, train=floats(20), metric=lambda out, y: -squared(out, y), loss=squared)


# -------------------------------------------------------------------------------------------- digests and description


def test_each_digest_changes_with_its_part_alone(net: nn.Module) -> None:
    def changed(a: Task, b: Task) -> set[str]:
        return {part for part, digest in a.digest().items() if b.digest()[part] != digest}

    task = Task(net, train=samples(20))
    other_weights = task.fresh_model()
    with torch.no_grad():
        other_weights.get_parameter("linear.weight")[0, 0] += 1
    other_buffers = task.fresh_model()
    other_buffers.get_buffer("bn.running_mean").add_(1)
    other_settings = task.fresh_model()
    other_settings.get_submodule("bn").eps = 0.1  # type: ignore[assignment]
    assert changed(task, Task(net, train=samples(20))) == set()
    assert changed(task, Task(other_weights, train=samples(20))) == {"weights"}
    assert changed(task, Task(other_buffers, train=samples(20))) == {"weights"}
    assert changed(task, Task(other_settings, train=samples(20))) == {"network"}
    assert changed(task, Task(net, train=samples(20), split_seed=1)) == {"data"}
    assert changed(task, Task(net, train=samples(20, 1))) == {"data"}


def test_the_description_is_json_and_says_what_was_cut(net: nn.Module) -> None:
    task = Task(net, train=samples(20), test=samples(5, 20), augment=shifted_by_noise, split_seed=3)
    assert json.loads(json.dumps(task.describe())) == {
        "name": "Net",
        "model": "Net",
        "example_input": [1, 1, 2, 2],
        "train": 18,
        "val": 2,
        "test": 5,
        "val_cut_from_train": {"fraction": 0.1, "seed": 3},
        "augment": "shifted_by_noise",
        "metric": "top1",
        "loss": "cross_entropy",
        "batch_size": 128,
    }


# -------------------------------------------------------------------------------------------------------- named tasks


def test_a_named_task_follows_its_data() -> None:
    task = Task.named("resnet8", "digits", split_seed=1)
    assert task.describe()["model"] == models.ModelSpec("resnet8", 10, 1, 8).to_dict()
    assert (task.n_train, task.n_val, task.n_test, task.name) == (1075, 358, 364, "resnet8 on digits")
    assert task.example_input.shape == (1, 1, 8, 8)
    assert task.augment is not None
    again = Task.named("resnet8", "digits", split_seed=1, model=task.model)
    assert again.model is task.model
    assert again.digest() == task.digest()


def test_a_named_task_loads_weights_or_says_why_not(tmp_path: Path) -> None:
    shape = {"in_channels": 1, "input_size": 8}
    torch.save(models.build("resnet8", seed=4, **shape).state_dict(), tmp_path / "good.pt")
    torch.save(models.build("resnet8", num_classes=7, **shape).state_dict(), tmp_path / "bad.pt")
    task = Task.named("resnet8", "digits", weights=tmp_path / "good.pt")
    assert torch.equal(task.model.get_parameter("conv1.weight"), torch.load(tmp_path / "good.pt")["conv1.weight"])
    with pytest.raises(WeightsError, match="num_classes=7"):
        Task.named("resnet8", "digits", weights=tmp_path / "bad.pt")
    with pytest.raises(UnknownNameError, match="Did you mean 'digits'"):
        Task.named("resnet8", "digit")


MAKE = """
import torch
from my_neighbour import classes
from autoprune.task import Task

def make_task():
    x = torch.arange(20.0).view(20, 1)
    return Task(torch.nn.Linear(1, classes), train=(x, torch.arange(20) % 2))

def nothing(): pass

def fails(): raise KeyError("lost")

def empty(): return Task(torch.nn.Linear(1, 2), train=(torch.zeros(0, 1), torch.zeros(0)))

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "my_neighbour.py").write_text("classes = 2\n")
    path = tmp_path / "my_task.py"
    path.write_text(MAKE)
    return path


def test_a_task_is_loaded_from_a_users_file(file: Path) -> None:
    path = list(sys.path)
    with torch.random.fork_rng(devices=[]):
        assert load_task(f"{file}:make_task").n_train == 18
        assert load_task("my_task.py:make_task").n_val == 2
    assert sys.path == path
    assert "my_task" not in sys.modules


@pytest.mark.parametrize(
    ("spec", "expected", "message"),
    [
        ("my_task.py", ConfigError, "FILE.py:FUNCTION, but got 'my_task.py'"),
        ("my_task:make_task", ConfigError, "FILE.py:FUNCTION"),
        ("my_tusk.py:make_task", ConfigError, "there is no file my_tusk.py"),
        ("my_task.py:make_tsk", UnknownNameError, "Did you mean 'make_task'"),
        ("my_task.py:number", UnknownNameError, "no function 'number'"),
        ("my_task.py:nothing", ConfigError, "returns a NoneType; add the `return`"),
        ("my_task.py:fails", ConfigError, r"fails \(KeyError: 'lost'\)"),
        ("my_task.py:empty", SplitError, "the train split is empty"),
        ("wrong.py:make_task", ConfigError, r"fails \(SyntaxError"),
    ],
)
def test_a_users_file_that_gives_no_task_is_refused(file: Path, spec: str, expected: type, message: str) -> None:
    file.with_name("wrong.py").write_text("def make_task(:\n")
    with torch.random.fork_rng(devices=[]), pytest.raises(expected, match=message) as error:
        load_task(spec)
    assert one_line(error)


def test_an_epoch_has_the_steps_of_the_loader_that_makes_it(net: nn.Module) -> None:
    inputs, targets = samples(60, 1)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=20)
    assert Task(net, train=loader, val=samples(20, 100)).steps_per_epoch(7) == 3
    assert Task(net, train=(inputs, targets), val=samples(20, 100)).steps_per_epoch(7) == 8
    assert Task(net, train=(inputs, targets), val=samples(20, 100)).steps_per_epoch(1000) == 1
