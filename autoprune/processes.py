"""Work in processes of its own, on this machine: for what can't share one, as searches that take turns with torch."""

import os
import pickle
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Final, TypeVar

import cloudpickle

from autoprune.errors import ExecutorError

__all__ = ["apart", "users_modules"]

T = TypeVar("T")

_PAUSE: Final = 0.2  # seconds between looks at what runs
_THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def apart(
    work: Callable[[T, int], None],
    given: T,
    numbers: Sequence[int],
    *,
    processes: int,
    threads: int,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Run `work(given, number)` for every number, each in a process of its own that ends with it.

    If one raises, the others are killed, and so they are if this call is interrupted.

    Args:
        work: A function.
        given: What all processes get. It must pickle; functions and classes that are not installed travel with it.
        numbers: In the order in which they are begun.
        processes: How many run together.
        threads: Of a process.
        tick: Called several times a second.

    Raises:
        ExecutorError: `given` can't be sent, or a process died.
        Exception: Whatever `work` raised.
    """
    waiting, running = deque(numbers), dict[int, subprocess.Popen[bytes]]()
    with tempfile.TemporaryDirectory(prefix="autoprune-") as folder:
        place = Path(folder)
        (place / "work").write_bytes(_dumped((work, given)))
        try:
            while waiting or running:
                while waiting and len(running) < processes:
                    number = waiting.popleft()
                    running[number] = _started(place, number, threads)
                time.sleep(_PAUSE)
                tick()
                for number, process in tuple(running.items()):
                    if process.poll() is not None:
                        del running[number]
                        _look_at(place / str(number), process.returncode)
        finally:
            for process in running.values():
                process.kill()
            for process in running.values():
                process.wait()


def users_modules() -> Iterator[ModuleType]:
    """Yield the modules that are not installed, which other processes may not find: they travel as they are."""
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    for name, module in tuple(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not file or not Path(file).is_absolute() or getattr(module, "__name__", None) != name:
            continue
        parents = Path(file).resolve().parents
        elsewhere = {parent.name for parent in parents} & {"site-packages", "dist-packages"}
        if name.partition(".")[0] not in ("autoprune", "__main__") and not elsewhere and installed.isdisjoint(parents):
            yield module


def _dumped(what: object) -> bytes:
    theirs = [
        module for module in users_modules() if module.__name__ not in cloudpickle.list_registry_pickle_by_value()
    ]
    for module in theirs:
        cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(what))
    except (TypeError, pickle.PicklingError) as error:
        raise ExecutorError(f"this can't be sent to another process: {str(error).splitlines()[0]}") from error
    finally:
        for module in theirs:
            cloudpickle.unregister_pickle_by_value(module)


def _started(place: Path, number: int, threads: int) -> "subprocess.Popen[bytes]":
    """Start a process; what it prints goes where errors go, as standard output may be a document."""
    found = [entry for entry in sys.path if entry]
    environment = os.environ | dict.fromkeys(_THREADS, str(threads)) | {"PYTHONPATH": os.pathsep.join(found)}
    command = [
        sys.executable,
        "-P",
        "-m",
        __name__,
        str(place),
        str(number),
    ]  # -P: what lies in this folder is no module
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=sys.__stderr__)


def _look_at(told: Path, code: int) -> None:
    """Raise what a process raised, or that it died."""
    if told.exists():
        raise pickle.loads(told.read_bytes())
    if code != 0:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise ExecutorError(f"a process died ({how}; memory may have run out); call again to go on from what is there")


def _main(folder: str, number: str) -> None:
    """Do one piece of work, and leave what it raises for who waits."""
    work, given = pickle.loads((Path(folder) / "work").read_bytes())
    try:
        work(given, int(number))
    except Exception as error:
        told = Path(folder) / f".{number}"
        told.write_bytes(_sendable(error))
        told.replace(Path(folder) / number)


def _sendable(error: Exception) -> bytes:
    """Return an exception pickled, or one that says the same where it can't be."""
    try:
        dumped = bytes(cloudpickle.dumps(error))
        pickle.loads(dumped)
    except Exception:  # as much as classes can object to
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return dumped


if __name__ == "__main__":
    _main(*sys.argv[1:])
