"""Errors a user can act on: what was expected, what was found, what to do."""

from __future__ import annotations

REQUEUE_EXIT_CODE = 85
"""Exit status of a run that stopped because it was asked to (SIGTERM, wall-clock limit) after saving: start the same command again.
The Slurm scripts of examples/launch requeue on it."""


class R1Error(Exception):
    """Base of every error meant for a user.

    The message always has three parts; tests check all of them.
    """

    def __init__(self, *, expected: str, found: str, fix: str) -> None:
        self.expected, self.found, self.fix = expected, found, fix
        super().__init__(f"expected: {expected}\n   found: {found}\n      do: {fix}")

    def __reduce__(self) -> tuple:
        return (_rebuild, (type(self), self.expected, self.found, self.fix))


def _rebuild(kind: type[R1Error], expected: str, found: str, fix: str) -> R1Error:
    """Keyword-only constructors do not survive pickling between worker processes by themselves."""
    return kind(expected=expected, found=found, fix=fix)


class ConfigError(R1Error):
    """A recipe, override or setting is wrong."""


class ArtifactError(R1Error):
    """An artifact is missing, incomplete, damaged or of the wrong kind."""


class DataError(R1Error):
    """Input data is wrong, or shards do not fit what reads them."""


class ParallelError(R1Error):
    """A parallel layout cannot work, or would be silently wrong."""


class CheckpointError(R1Error):
    """A checkpoint is missing, damaged or does not fit the model."""


class EnvironmentProblem(R1Error):
    """The machine lacks something that was asked for: a package, a device, disk space."""
