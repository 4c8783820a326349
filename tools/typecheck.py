"""Check the types of the whole package: `mypy --strict` on a regular install of it, seen from another folder.

In the repository's root mypy can't see the folders that setup.py maps into the package, and says nothing about it. So
the package is installed to build/typed, mypy runs there, and the check fails if mypy saw fewer files than the three
folders hold. Run it with the environment's python, from anywhere: `.venv/bin/python tools/typecheck.py`.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["FOLDERS", "checked_files", "main", "python_files", "typecheck"]

FOLDERS = ("agents", "autoprune", "search_spaces")


def python_files(root: Path) -> list[Path]:
    """Return the Python files of the package's three folders under `root`."""
    return sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))


def checked_files(output: str) -> int:
    """Return how many files mypy says that it checked, 0 when it doesn't say."""
    counts = re.findall(r"(?:no issues found in|checked) (\d+) source files?", output)
    return int(counts[-1]) if counts else 0


def typecheck(root: Path, mypy: tuple[str, ...] = (sys.executable, "-m", "mypy")) -> str | None:
    """Install the package at `root` into its build folder and run mypy on it; its output goes to the terminal.

    Args:
        root: The repository.
        mypy: The command that checks types, without its arguments.

    Returns:
        What is wrong, in one line, or None.
    """
    shutil.rmtree(root / "build", ignore_errors=True)  # or a module deleted since would still be there
    typed = root / "build" / "typed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(typed), str(root)], check=True)
    arguments = ["--config-file", str(root / "pyproject.toml"), "--cache-dir", str(root / ".mypy_cache")]
    run = subprocess.run(
        [*mypy, *arguments, "-p", "autoprune"], cwd=typed, stdout=subprocess.PIPE, text=True, check=False
    )
    print(run.stdout, end="")
    if run.returncode:
        return "mypy found errors"
    files, checked = len(python_files(root)), checked_files(run.stdout)
    if checked < files:
        return f"mypy checked {checked} files, but {', '.join(FOLDERS)} hold {files}: some are not installed"
    return None


def main() -> None:
    """Check the repository that this file is in; exit with 1 and one line when something is wrong."""
    if wrong := typecheck(Path(__file__).resolve().parent.parent):
        sys.exit(f"typecheck: {wrong}")


if __name__ == "__main__":
    main()
