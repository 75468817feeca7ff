"""Parameters in the same order on all ranks: digests of their values at construction, and of their names in models."""

import hashlib
import os.path
import weakref
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from .arrays import dense_strides
from .errors import MismatchError
from .modes import outside_inference
from .ownership import bytes_of
from .world import World

__all__ = ["AttachedModels", "Fingerprint", "fingerprints", "require_same_order"]

SAMPLES = 1024  # of a parameter's elements its digest is of so many, or up to twice as many
MODULUS = 2**64

Names = list[tuple["weakref.ref[torch.nn.Parameter]", str]]


class Fingerprint(NamedTuple):
    """The features that tell a parameter from others, apart from its place: a digest of its values, shape and type."""

    name: str
    shape: tuple[int, ...]
    digest: int

    @property
    def described(self) -> str:
        """The parameter in the words of an error, in one line."""
        return f"{self.name!r} of shape {self.shape}"


def digest_of(*parts: bytes) -> int:
    """64 bits of these bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


@outside_inference
@torch.no_grad()
def fingerprints(params: Sequence[torch.Tensor], names: Sequence[str]) -> list[Fingerprint]:
    """A fingerprint of each parameter, which reads some thousand of its elements.

    Parameters of equal shape whose values are drawn at random have different ones; so do those that differ in few
    elements only by chance. Those that are alike, such as biases of zeros, have the same.
    """
    return [
        Fingerprint(name, tuple(param.shape), _digest(param))
        for name, param in zip(names, params, strict=True)
    ]


def _digest(param: torch.Tensor) -> int:
    form = f"{param.dtype} {tuple(param.shape)}".encode()
    values = param.detach()
    if tuple(values.stride()) == dense_strides(values.shape, values.stride()):
        flat = values.as_strided((values.numel(),), (1,))
    else:
        flat = values.reshape(-1)
    sample = flat[:: max(1, flat.numel() // SAMPLES)]
    return digest_of(form, bytes_of(sample).numpy().tobytes())


def require_same_order(world: World, mine: Sequence[Fingerprint]) -> None:
    """Collective: complain if ranks hand over the same parameters in different orders.

    Ranks may well have different values, as rank 0's are taken. But if two ranks have the same values in different
    orders, then layers of equal shape would be exchanged.

    Raises:
        MismatchError: on every rank; it names the first parameter that is elsewhere.
    """
    if world.size == 1:
        return
    ordered = digest_of(*(one.digest.to_bytes(8, "little") for one in mine))
    whole = sum(digest_of(one.digest.to_bytes(8, "little")) for one in mine) % MODULUS
    pairs = [text.split() for text in world.gather_words(f"{ordered} {whole}")]
    if (suspects := _first_exchange(pairs)) is None:
        return
    lists = [_read(text) for text in world.gather_words("\n".join(f"{p.digest} {p.described}" for p in mine))]
    (rank, other), (ours, theirs) = suspects, (lists[suspects[0]], lists[suspects[1]])
    i = next(i for i, (one, two) in enumerate(zip(ours, theirs, strict=True)) if one[0] != two[0])
    there = next(j for j, two in enumerate(theirs) if two[0] == ours[i][0])
    raise MismatchError(
        f"rank {rank} and rank {other} hand over the same parameters in different orders, so layers would be "
        f"exchanged: {ours[i][1]} of rank {rank} is {theirs[there][1]} of rank {other}, which has {theirs[i][1]} in "
        "its place. Hand them over in the same order on every rank, as model.parameters() gives them; a set has "
        "another order in every process"
    )


def _first_exchange(pairs: Sequence[Sequence[str]]) -> tuple[int, int] | None:
    """The first two ranks whose parameters are the same, in different orders."""
    first_with: dict[str, int] = {}
    for rank, (ordered, whole) in enumerate(pairs):
        first = first_with.setdefault(whole, rank)
        if pairs[first][0] != ordered:
            return first, rank
    return None


def _read(text: str) -> list[tuple[int, str]]:
    lines = [line.split(" ", 1) for line in text.split("\n")]
    return [(int(digest), name) for digest, name in lines]


class AttachedModels:
    """The models that are attached to an optimizer, without keeping them alive, and how they name its parameters."""

    def __init__(self) -> None:
        self._models: list[tuple[weakref.ref[torch.nn.Module], Names]] = []

    def add(self, model: torch.nn.Module) -> None:
        """The optimizer is attached to this model, whose names hold from now on even if it is dropped."""
        if all(reference() is not model for reference, _ in self._models):
            self._models.append((weakref.ref(model), _names_in(model)))

    def living(self) -> list[torch.nn.Module]:
        """The models that are still there."""
        return [model for reference, _ in self._models if (model := reference()) is not None]

    def digest(self, index: Mapping[int, int]) -> int:
        """A digest of the place in the optimizer that every name has, in 64 bits; 0 without a model.

        A model inside another, such as a wrapper, names the parameters alike apart from a common beginning, which does
        not count.

        Args:
            index: the places of parameters in the optimizer, by identity.
        """
        digests = set()
        for reference, names in self._models:
            if (model := reference()) is not None:  # it may have got more parameters
                known = {id(param) for by_param, _ in names if (param := by_param()) is not None}
                names += [(p, name) for p, name in _names_in(model) if id(p()) not in known]
            living = [(id(param), name) for by_param, name in names if (param := by_param()) is not None]
            if places := [(index[key], name) for key, name in living if key in index]:
                digests.add(_digest_of_places(places))
        return sum(digests) % MODULUS or int(bool(digests))


def _names_in(model: torch.nn.Module) -> Names:
    return [(weakref.ref(param), name) for name, param in model.named_parameters(remove_duplicate=False)]


def _digest_of_places(places: Sequence[tuple[int, str]]) -> int:
    folders = [name.split(".")[:-1] for _, name in places]
    common = len(os.path.commonprefix(folders))
    return digest_of(
        *(f"{place} {'.'.join(name.split('.')[common:])}".encode() for place, name in sorted(places))
    )
