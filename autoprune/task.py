"""`Task`: the network, data and measures that a user brings, checked, and train, validation and test kept apart.

How splits are read is in `autoprune.data`; nothing here trains or evaluates.
"""

import copy
import hashlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune import data, models
from autoprune.data import Augment, Batch, Split
from autoprune.errors import AutopruneError, ConfigError, SplitError, TaskError, TestSetError, UnknownNameError

__all__ = ["FINALISER", "Loss", "Metric", "Task", "cross_entropy", "load_task", "top1"]

Metric = Callable[[Tensor, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

FINALISER: Final = "finaliser"
_CHECKED_SAMPLES: Final = 8


def top1(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return 1.0 where the largest of `outputs` `(n, classes)` is at `targets` `(n,)`, else 0.0; `(n,)`."""
    return (outputs.argmax(1) == targets).float()


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return each sample's cross entropy in nats, `(n,)`, from scores `(n, classes)` and targets `(n,)` int64."""
    return F.cross_entropy(outputs, targets, reduction="none")


@final
class Task:
    """A trained network and the data to judge it by; checked when it is made, so that a search does not fail later.

    Splits are Datasets, DataLoaders, pairs of tensors `(inputs, targets)`, or `autoprune.data.Split`s.

    Args:
        model: The network; kept as it is and never changed. Work is done on `fresh_model()`, on the device that the
            network is on; data need not be there, and is best left on the CPU.
        train: What fine-tuning and batch-norm calibration read.
        val: What candidates are measured on. Without it, `val_fraction` of `train` is cut off, by `split_seed`. It is
            then not augmented, since `augment` is applied to training batches alone; but augmentation inside the
            `train` dataset stays: in that case give `val` yourself, or move the augmentation to `augment`.
        test: Sealed; `open_test` hands it to the finaliser, once.
        example_input: `(1, ...)`, what the network is traced with; by default the first of `val`.
        augment: Takes a batch of inputs, on the device that the data is on, and a `torch.Generator`, which is on the
            CPU; returns new inputs.
        metric: Per-sample score in [0, 1], `(outputs, targets) -> (n,)` float, higher is better. Both arguments are on
            the network's device.
        loss: Per-sample loss, `(outputs, targets) -> (n,)` float; likewise.
        val_fraction: In (0, 1).
        split_seed: Of the cut.
        batch_size: Of validation, where that split can be kept neither in memory nor in a file.
        name: For reports; by default the network's.

    Raises:
        SplitError: A split is empty, unreadable, or shares samples with another (see `autoprune.data.overlap`).
        TaskError: The network fails on the example or on validation data, or its outputs do not suit the targets.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        train: object,
        val: object = None,
        test: object = None,
        example_input: Tensor | None = None,
        augment: Augment | None = None,
        metric: Metric = top1,
        loss: Loss = cross_entropy,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        batch_size: int = 128,
        name: str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TaskError(f"the model must be a torch.nn.Module, but got a {type(model).__name__}; give an instance")
        if batch_size < 1:
            raise ConfigError(f"`batch_size >= 1` must hold, but got batch_size={batch_size}")
        splits = {"train": train, "val": val, "test": test}
        given = {role: data.as_split(split) for role, split in splits.items() if split is not None}
        _check_apart(given)
        self._val_cut = None
        if "val" not in given:
            given["train"], given["val"] = data.cut(given["train"], val_fraction, split_seed)
            self._val_cut = {"fraction": val_fraction, "seed": split_seed}
        self.model = model
        self.augment = augment
        self.metric = metric
        self.loss = loss
        self.batch_size = batch_size
        spec = models.spec_of(model)
        self.name = name or (spec.name if spec else type(model).__name__)
        self._train = given["train"]
        self._val = given["val"]
        self._sealed_test = _Sealed(given.get("test"))
        first = _first_batch(self._val, "val")
        device = next(model.parameters(), first[0]).device
        self.example_input = (first[0] if example_input is None else example_input)[:1].clone().to(device)
        self._check(first)

    @classmethod
    def named(
        cls,
        model_name: str,
        data_name: str,
        *,
        root: str | Path | None = None,
        weights: str | Path | None = None,
        download: bool = False,
        val_fraction: float | None = None,
        split_seed: int = 0,
        model: nn.Module | None = None,
    ) -> Self:
        """Return the task of a named model on a named data set, whose channels and classes the model takes over.

        Args:
            model_name: As in `autoprune.models.build`.
            data_name: As in `autoprune.data.load`.
            root: The folder that holds the data.
            weights: A file for `autoprune.models.load_weights`.
            download: Whether the data may be fetched.
            val_fraction: Of the training samples, cut off for validation; by default the data set's own.
            split_seed: Of the cut.
            model: The network itself, where it is there already; then nothing is built.

        Raises:
            UnknownNameError: There is no such model or data set.
            SplitError: The data is not there.
            WeightsError: The weights do not fit.
        """
        source = data.load(data_name, root, download)
        if model is None:
            shape = {"in_channels": source.in_channels, "input_size": source.input_size}
            model = models.build(model_name, num_classes=source.num_classes, **shape)
        if weights is not None:
            models.load_weights(model, weights)
        return cls(
            model,
            train=source.train,
            test=source.test,
            augment=source.augment,
            val_fraction=source.val_fraction if val_fraction is None else val_fraction,
            split_seed=split_seed,
            name=f"{model_name} on {data_name}",
        )

    @property
    def n_train(self) -> int:
        """Training samples, without those cut off for validation."""
        return len(self._train)

    @property
    def n_val(self) -> int:
        """Validation samples."""
        return len(self._val)

    @property
    def n_test(self) -> int:
        """Test samples; 0 where the task has no test split."""
        return self._sealed_test.size

    @property
    def test(self) -> None:
        """Not to be had: the test split is read once, at the end, through `open_test`.

        Raises:
            TestSetError: Always.
        """
        raise TestSetError("the test set is sealed: it is read once, by `finalize`; use `val_batches` to compare")

    def open_test(self, reader: str) -> Split:
        """Return the test split to the finaliser, once in a task's life.

        Args:
            reader: Who asks; `FINALISER` alone is answered.

        Raises:
            TestSetError: Another asks, it was opened before, or the task has none.
        """
        return self._sealed_test.open(reader)

    def without_test(self) -> "Task":
        """Return the same task, network and data shared, whose test split is not there."""
        task = copy.copy(self)
        task._sealed_test = _Sealed(None)
        return task

    def on(self, device: torch.device | str) -> "Task":
        """Return the same task, data shared, with a copy of the network on a device; itself if it is there already.

        Raises:
            TaskError: Network, metric or loss don't run there.
        """
        device = torch.device(device)
        here = {tensor.device for tensor in (*self.model.parameters(), *self.model.buffers(), self.example_input)}
        if here == {device}:
            return self
        task = copy.copy(self)
        task.model = self.fresh_model().to(device)
        task.example_input = self.example_input.to(device)
        try:
            task._check(_first_batch(self._val, "val"))
        except TaskError as error:
            raise TaskError(f"on {device} {error}") from error
        return task

    @property
    def test_read(self) -> bool:
        """Whether the test split was opened already."""
        return self._sealed_test.read

    def require_test(self) -> None:
        """Refuse what will read the test split, if there is one, before the work that comes first.

        Raises:
            TestSetError: It was read already, or the task was sent to this process without it.
        """
        if self.n_test:
            self._sealed_test.require()

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return how many training batches make a pass: of this size, or of a DataLoader's own."""
        loader = self._train.loader if isinstance(self._train, data.LoaderSplit) else None
        own = None if loader is None else loader.batch_size
        return max(1, len(self._train) // (own or batch_size)) if loader is None or own else len(loader)

    def fresh_model(self) -> nn.Module:
        """Return a deep copy of the network, in the mode and on the device it is in."""
        return copy.deepcopy(self.model)

    def train_batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Iterate over shuffled, augmented training batches without end, the same ones for a seed.

        A pass leaves out its short last batch (unless it is the only one), which batch norm could not cope with.
        """
        generator = torch.Generator().manual_seed(seed)
        while True:
            full = 0
            for inputs, targets in self._train.batches(batch_size, shuffle=generator):
                full = full or len(inputs)
                if len(inputs) == full:
                    yield (inputs if self.augment is None else self.augment(inputs, generator)), targets

    def calibration_batches(self, images: int, batch_size: int, seed: int) -> Iterator[Batch]:
        """Iterate over `images` augmented training images, the same ones for a seed; through `train` again if need be.

        A single image left over for the last batch is dropped: it has no variance.
        """
        for inputs, targets in self.train_batches(batch_size, seed):
            if images < 1 or (images == 1 and len(inputs) > 1):
                return
            yield inputs[:images], targets[:images]
            images -= len(inputs)

    def val_batches(self, batch_size: int | None = None) -> Iterator[Batch]:
        """Iterate once over the validation samples, never augmented, always in the same order."""
        return self._val.batches(batch_size or self.batch_size)

    def digest(self) -> dict[str, str]:
        """Return digests of the architecture ("network"), of its tensors ("weights") and of train and val ("data").

        The network's holds module names, types and settings, and tensor shapes; a change in a `forward` alone does
        not show.
        """
        network, weights = hashlib.sha256(), hashlib.sha256()
        for name, module in self.model.named_modules():
            network.update(f"{name} {type(module).__qualname__} {module.extra_repr()}\n".encode())
        for name, tensor in itertools.chain(self.model.named_parameters(), self.model.named_buffers()):
            network.update(f"{name} {tuple(tensor.shape)}\n".encode())
            weights.update(name.encode() + data.tensor_bytes(tensor))
        both = hashlib.sha256(f"{self._train.digest()} {self._val.digest()}".encode())
        return {"network": network.hexdigest()[:16], "weights": weights.hexdigest()[:16], "data": both.hexdigest()[:16]}

    def describe(self) -> dict[str, Any]:
        """Return what the task is, as a JSON object."""
        spec = models.spec_of(self.model)
        return {
            "name": self.name,
            "model": spec.to_dict() if spec else type(self.model).__qualname__,
            "example_input": list(self.example_input.shape),
            "train": self.n_train,
            "val": self.n_val,
            "test": self.n_test,
            "val_cut_from_train": self._val_cut,
            "augment": None if self.augment is None else data.callable_name(self.augment),
            "metric": data.callable_name(self.metric),
            "loss": data.callable_name(self.loss),
            "batch_size": self.batch_size,
        }

    def _check(self, batch: Batch) -> None:
        """Run the network, the metric and the loss on a few validation samples, and look at the targets."""
        inputs, targets = (part[:_CHECKED_SAMPLES] for part in batch)
        try:
            model = self.fresh_model().eval()
        except Exception as error:
            raise TaskError(
                f"the model can't be copied ({_one_line(error)}); make copy.deepcopy(model) work"
            ) from error
        _forward(model, self.example_input, "the example input", "give an `example_input` that it takes")
        outputs = _forward(model, inputs, "validation inputs", "give data of the shape that the model was made for")
        for role, split in (("train", self._train), ("val", self._val)):
            labels = split.targets if isinstance(split, data.TensorSplit) else _first_batch(split, role)[1]
            self._check_targets(outputs, labels, role)
        for what, function in (("metric", self.metric), ("loss", self.loss)):
            wanted = f"the {what} must return one number a sample, {(len(inputs),)}"
            try:
                values = function(outputs, targets.to(outputs.device))
            except Exception as error:
                raise TaskError(f"{wanted}, but fails ({_one_line(error)}); give a `{what}` for this output") from error
            if not isinstance(values, Tensor) or values.shape != (len(inputs),):
                got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise TaskError(f"{wanted}, but returns {got}; leave out the mean (reduction='none')")
            if what == "metric" and not bool(((values >= 0) & (values <= 1)).all()):
                found = values[(values < 0) | (values > 1) | values.isnan()][0].item()
                raise TaskError(f"the metric must lie in [0, 1], higher being better, but returns {found:g}; scale it")

    def _check_targets(self, outputs: Tensor, targets: Tensor, role: str) -> None:
        """Class numbers must be among the outputs, where the measures are the default ones."""
        if self.metric is not top1 and self.loss is not cross_entropy:
            return
        if outputs.ndim != 2:
            raise TaskError(
                f"the default metric and loss need outputs (n, classes), but got {tuple(outputs.shape)}; "
                "give `metric` and `loss` for this network"
            )
        if targets.dtype != torch.int64 or targets.ndim != 1:
            raise TaskError(
                f"targets must be class numbers, (n,) of int64, but {role} has {tuple(targets.shape)} of "
                f"{targets.dtype}; convert them, or give `metric` and `loss`"
            )
        classes, low, high = outputs.shape[1], int(targets.min()), int(targets.max())
        if low < 0 or high >= classes:
            raise TaskError(
                f"targets must be 0 to {classes - 1} for a model of {classes} outputs, but {role} holds "
                f"{low if low < 0 else high}; build the model with num_classes={high + 1}, or number the classes from 0"
            )


class _Sealed:
    """A split that can be taken out once, by the finaliser. Pickled it leaves its samples behind; copies share it."""

    def __init__(self, split: Split | None) -> None:
        self.size = 0 if split is None else len(split)
        self.read = False
        self._split = split
        self._sent = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave the samples where they are."""
        return vars(self) | {"_split": None, "_sent": True}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def open(self, reader: str) -> Split:
        if reader != FINALISER:
            raise TestSetError(
                f"the test set is for the {FINALISER} alone, but '{reader}' asks; compare on `val_batches`"
            )
        if self.size == 0:
            raise TestSetError("the task has no test set; give one: Task(..., test=...)")
        split = self.require()
        self._split = None
        self.read = True
        return split

    def require(self) -> Split:
        """Return the split, which stays sealed.

        Raises:
            TestSetError: It is not there.
        """
        if self._sent:
            raise TestSetError("this task was sent here without its test set, which is read where it was made")
        if self._split is None:
            raise TestSetError("the test set has been read already; a second reading would make it a validation set")
        return self._split


def _check_apart(splits: dict[str, Split]) -> None:
    if "train" not in splits:
        raise SplitError("there is no training data; give `train`: fine-tuning and calibration need it")
    for role, split in splits.items():
        if len(split) == 0:
            raise SplitError(f"the {role} split is empty; give at least one sample")
    for (role_a, a), (role_b, b) in itertools.combinations(splits.items(), 2):
        common = data.overlap(a, b)
        if common:
            raise SplitError(
                f"{role_a} and {role_b} must not overlap, but share {common} samples of {len(a)} and {len(b)}; "
                f"give other data, or leave out `val` to have it cut from train"
            )


def _first_batch(split: Split, role: str) -> Batch:
    try:
        return next(split.batches(_CHECKED_SAMPLES))
    except AutopruneError:
        raise
    except Exception as error:
        raise SplitError(f"the {role} split can't be read ({_one_line(error)}); make its dataset readable") from error


def _forward(model: nn.Module, inputs: Tensor, what: str, way_out: str) -> Tensor:
    tried = f"the model must take {what} of shape {tuple(inputs.shape)}"
    parameter = next(model.parameters(), inputs)
    try:
        with torch.no_grad():
            outputs = model(inputs.to(parameter.device))
    except Exception as error:
        raise TaskError(f"{tried}, but fails ({_one_line(error)}); {way_out}") from error
    if not isinstance(outputs, Tensor):
        raise TaskError(f"{tried} and return a tensor, but returns a {type(outputs).__name__}; wrap it to return one")
    if outputs.ndim == 0 or len(outputs) != len(inputs):
        raise TaskError(
            f"{tried} and return one row a sample, but returns {tuple(outputs.shape)}; "
            "keep the batch dimension first, as in flatten(1)"
        )
    return outputs


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def load_task(spec: str) -> Task:
    """Return the task that a function in a user's file makes.

    The file is run as a module of its own; it may import its neighbours, as a script may.

    Args:
        spec: `path/to/file.py:function`; the function takes no argument.

    Raises:
        ConfigError: There is no such file or function, it fails, or returns something else than a Task.
    """
    path_text, colon, function_name = spec.rpartition(":")
    path = Path(path_text)
    if not colon or path.suffix != ".py" or not function_name.isidentifier():
        raise ConfigError(f"a task is given as FILE.py:FUNCTION, but got '{spec}'; for example my_task.py:make_task")
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; give the task as FILE.py:FUNCTION")
    path = path.resolve()
    module_name = f"_autoprune_task_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"{path} can't be imported; give the task as FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    sys.path.insert(0, str(path.parent))
    try:
        module_spec.loader.exec_module(module)
        functions = [name for name, value in vars(module).items() if callable(value) and not isinstance(value, type)]
        if function_name not in functions:
            raise UnknownNameError("function", function_name, functions)
        task = getattr(module, function_name)()
    except AutopruneError:
        raise
    except Exception as error:
        raise ConfigError(f"{spec} fails ({_one_line(error)}); run the file alone to see where") from error
    finally:
        sys.path.remove(str(path.parent))
    if not isinstance(task, Task):
        raise ConfigError(
            f"{spec} must return an autoprune.Task, but returns a {type(task).__name__}; add the `return`"
        )
    return task
