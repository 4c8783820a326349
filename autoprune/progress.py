"""What a long job tells whoever watches: lines, and where it stands. How it is shown is the caller's choice."""

from typing import Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """Shows a search's progress; `begin` and `end` frame each stage, `step` comes any number of times between."""

    def line(self, text: str) -> None:
        """Show a line that stays."""
        ...

    def begin(self, stage: str, total: int) -> None:
        """Start a stage of so many steps."""
        ...

    def step(self, done: int, text: str) -> None:
        """Say how many steps of the stage are done, with a few words."""
        ...

    def end(self) -> None:
        """End the stage."""
        ...


class Silent:
    """Shows nothing."""

    def line(self, text: str) -> None:
        """Do nothing."""

    def begin(self, stage: str, total: int) -> None:
        """Do nothing."""

    def step(self, done: int, text: str) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""
