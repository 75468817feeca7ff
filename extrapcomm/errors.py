"""What can go wrong, by who has to act."""

__all__ = ["CommError", "DeviceError", "Error", "MismatchError", "PeerError", "UsageError"]


def describe(error: BaseException) -> str:
    """An error in words for other ranks: its own, and its kind if it is not one of ours."""
    return str(error) if isinstance(error, Error) else f"{type(error).__name__}: {error}"


def of_kind(name: str, text: str) -> "Error":
    """An error that another rank had, by the name of its class; a UsageError if that is not one of ours."""
    kinds = {kind.__name__: kind for kind in (ArgumentError, MismatchError, CommError, DeviceError)}
    return kinds.get(name, UsageError)(text)


class Error(RuntimeError):
    """Every failure that extrapcomm raises itself."""


class UsageError(Error, ValueError):
    """The call cannot be done as asked; raised before anything changes, on all ranks if one of them found it."""


class ArgumentError(UsageError, TypeError):
    """A constructor was called with an argument that it does not have, or without one that it needs."""


class MismatchError(Error):
    """The ranks did not ask for the same thing; raised on every rank before a weight is touched."""


class PeerError(Error):
    """Another rank died, left, or did not come in time.

    Attributes:
        rank: the rank that is missing.
        step: the step at which it was missed.
        kind: "died", "silent" (it did not come in time), "left", "interrupted" or "abandoned" (by an error of its own).
        reason: the uncaught exception that ended it, in words; empty if it had none or could not say.
    """

    def __init__(self, text: str, rank: int, step: int, kind: str = "died", reason: str = "") -> None:
        super().__init__(text)
        self.rank = rank
        self.step = step
        self.kind = kind
        self.reason = reason


class CommError(Error):
    """The operating system or MPI refused something."""


class DeviceError(Error):
    """An array lies on a device that this build or this call cannot use."""
