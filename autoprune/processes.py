"""Work in processes of its own, on this machine: for what can't share one, as searches that take turns with torch."""

import os
import pickle
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Final, TypeVar

import cloudpickle

from autoprune.errors import AutopruneError, ExecutorError

__all__ = ["apart", "packed", "users_modules"]

T = TypeVar("T")

_PAUSE: Final = 0.2  # seconds between looks at what runs
_THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def packed(work: Callable[[T, int], None], given: T) -> bytes:
    """Return a function and its first argument as `apart` takes them.

    Functions and classes that are not installed travel with them.

    Raises:
        ExecutorError: They can't be sent.
    """
    registered = cloudpickle.list_registry_pickle_by_value()
    theirs = [module for module in users_modules() if module.__name__ not in registered]
    for module in theirs:
        cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps((work, given)))
    except Exception as error:  # as much as classes can object to
        told = str(error).partition("\n")[0]
        raise ExecutorError(f"this can't be sent to another process: {told}") from error
    finally:
        for module in theirs:
            cloudpickle.unregister_pickle_by_value(module)


def apart(
    work: bytes,
    numbers: Sequence[int],
    *,
    processes: int,
    threads: int,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Run `work(given, number)` for every number, each in a process of its own that ends with it.

    If one raises, the others are killed, and so they are if this call is interrupted, or this process dies.

    Args:
        work: What `packed` made of function and argument.
        numbers: In the order in which they are begun.
        processes: How many run together.
        threads: Of a process.
        tick: Called several times a second.

    Raises:
        ExecutorError: A process died.
        Exception: Whatever `work` raised.
    """
    waiting, running = deque(numbers), dict[int, subprocess.Popen[bytes]]()
    with tempfile.TemporaryDirectory(prefix="autoprune-") as folder:
        place = Path(folder)
        (place / "work").write_bytes(work)
        try:
            while waiting or running:
                while waiting and len(running) < processes:
                    number = waiting.popleft()
                    running[number] = _started(place, number, threads)
                time.sleep(_PAUSE)
                tick()
                for number, process in tuple(running.items()):
                    if process.poll() is not None:
                        _close(running.pop(number))
                        _look_at(place / str(number), process.returncode)
        finally:
            for process in running.values():
                process.kill()
            for process in running.values():
                process.wait()
                _close(process)


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
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=sys.__stderr__)


def _close(process: "subprocess.Popen[bytes]") -> None:
    if process.stdin is not None:
        process.stdin.close()


def _look_at(told: Path, code: int) -> None:
    """Raise what a process raised, or that it died."""
    if not told.exists():
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise ExecutorError(f"a process died ({how}; memory may have run out); call again to go on from what is there")
    error = pickle.loads(told.read_bytes())
    if error is not None:
        raise error


# -- in the process ---------------------------------------------------------------------------------------------------


def _main(folder: str, number: str) -> None:
    """Do one piece of work, and leave None, or what it raises, for who waits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who waits is interrupted too, and kills this process
    threading.Thread(target=_die_with_who_waits, daemon=True).start()
    work, given = pickle.loads((Path(folder) / "work").read_bytes())
    outcome = pickle.dumps(None)
    try:
        work(given, int(number))
    except Exception as error:
        outcome = _sendable(error)
    told = Path(folder) / f".{number}"
    told.write_bytes(outcome)
    told.replace(Path(folder) / number)


def _die_with_who_waits() -> None:
    """End this process when the other end of its input is closed, by whatever."""
    while os.read(0, 1):
        pass
    os._exit(1)


def _sendable(error: Exception) -> bytes:
    """Return an exception pickled, with its traceback as a note; where it can't be, one that says the same."""
    note = "in another process:\n" + "".join(traceback.format_exception(error)).rstrip()
    try:
        error.add_note(note)
        dumped = bytes(cloudpickle.dumps(error))
        pickle.loads(dumped)
    except Exception:  # as much as classes can object to
        ours = isinstance(error, AutopruneError)
        alike = AutopruneError(str(error)) if ours else RuntimeError(f"{type(error).__name__}: {error}")
        alike.add_note(note)
        return pickle.dumps(alike)
    return dumped


if __name__ == "__main__":
    _main(*sys.argv[1:])
