"""The exceptions that cross rooms: what the command line turns into its exit codes."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can mend: exit code 2, one line, no traceback.

    The message says what is wrong, where, what was given, what is allowed and what to do.
    """


class AgreedError(UserError):
    """A mistake that all processes of a run end with: the first one says it, once."""


class Interrupted(Exception):  # noqa: N818 - not an error
    """Work stopped early by a signal, its state saved: exit code 75, the same command resumes."""


class PeerLost(Exception):  # noqa: N818 - the error is another process's
    """A process of the same run is gone or silent: exit code 1; that process names the cause."""
