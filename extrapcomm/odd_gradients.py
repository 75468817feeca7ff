"""Gradients that cannot be copied as bytes: those that torch converts, and those that cannot be used at all."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import _core
from .errors import UsageError

__all__ = [
    "ABSENT",
    "PLAIN_CLASSES",
    "Reader",
    "held_alone",
    "is_held",
    "is_shared",
    "is_plain_class",
    "looks_at",
    "reader_for",
    "require_usable",
]

ABSENT = -1  # bytes of a gradient that is None

# The classes whose tensors are what their memory says.
PLAIN_CLASSES = (torch.Tensor, torch.nn.Parameter)


def is_plain_class(tensor: torch.Tensor) -> bool:
    """Return true if the tensor is of no class that could mean something else by its memory."""
    return type(tensor) in PLAIN_CLASSES


def require_usable(grad: torch.Tensor, param: torch.Tensor, name: str) -> None:
    """UsageError if this gradient cannot be converted to one of the parameter."""
    if wrong := _fault(grad, param):
        raise UsageError(f"the gradient of parameter {name!r} {wrong}")


def _fault(grad: torch.Tensor, param: torch.Tensor) -> str | None:
    """The predicate of a sentence, if there is something wrong."""
    if grad.layout != torch.strided:
        kind = "is sparse" if "sparse" in str(grad.layout) else "has another layout"
        return f"{kind} ({grad.layout}): use dense ones (sparse=False in Embedding)"
    if grad.is_nested or grad.is_quantized:
        return f"is {'nested' if grad.is_nested else 'quantized'}: use a plain tensor"
    if grad.is_complex():
        return (
            f"is {grad.dtype}, and the parameter is {param.dtype}: assign its real part, or its imaginary one"
        )
    if grad.device != param.device:
        return f"is on {grad.device}, and the parameter is on {param.device}: move it there first"
    if grad.shape != param.shape:
        return f"has the shape {tuple(grad.shape)}, and the parameter has {tuple(param.shape)}"
    if is_plain_class(grad) and not grad._is_zerotensor() and _end(grad) > grad.untyped_storage().nbytes():
        return "has no memory any more: somebody released or resized its storage"
    return None


def _end(tensor: torch.Tensor) -> int:
    """The byte in its storage behind a tensor's last one."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()


# Torch has no public function for this count; without it, gradients are taken to be nobody else's.
_storage_count = getattr(torch._C, "_storage_Use_Count", None)


def _holders(param: torch.Tensor) -> tuple[int, int]:
    """Return how many references there are to the parameter's gradient, and how many tensors share its memory."""
    grad = param.grad
    if grad is None or _storage_count is None or not is_plain_class(grad) or grad.layout != torch.strided:
        return (0, 0)
    return sys.getrefcount(grad), _storage_count(grad.untyped_storage()._cdata)


def _alone() -> tuple[int, int]:
    with torch.inference_mode(False), torch.enable_grad():
        param = torch.nn.Parameter(torch.empty(1, dtype=torch.float32, device="cpu"))
        torch.autograd.backward(param.sum())
        return _holders(param)


_ALONE = _alone()


def held_alone(param: torch.Tensor) -> bool:
    """Return true if nobody but the parameter has its gradient, or another look at the gradient's memory.

    The caller may hold no reference to the gradient either.
    """
    return _holders(param) == _ALONE


def looks_at(tensor: torch.Tensor) -> tuple[int, int]:
    """Return how many uses of this very tensor there are, and how many tensors share its memory."""
    if _storage_count is None or not hasattr(tensor, "_use_count"):
        return (0, 0)
    return tensor._use_count(), _storage_count(tensor.untyped_storage()._cdata)


def is_shared(tensor: torch.Tensor) -> bool:
    """Return true if another tensor lies in the memory of this one, which the caller alone has."""
    return _storage_count is not None and _storage_count(tensor.untyped_storage()._cdata) > _SOLE


def _count_of_one() -> int:
    tensor = torch.empty(1, dtype=torch.float32, device="cpu").detach()
    return 0 if _storage_count is None else int(_storage_count(tensor.untyped_storage()._cdata))


_SOLE = _count_of_one()


def is_held(tensors: list[torch.Tensor], i: int) -> bool:
    """Return true if anybody but this list has a reference to its i-th tensor."""
    return sys.getrefcount(tensors[i]) > _LISTED


_LISTED = sys.getrefcount([object()][0])


class Reader:
    """As the compiled GradientReader, for a torch without DLPack's table: slower.

    Args:
        places: for each of this rank's workers, its gradient memory as the parameters see it.
        memory: the addresses from the first worker's gradients to the end of the last one's.
    """

    def __init__(self, places: Sequence[Sequence[torch.Tensor]], memory: range) -> None:
        self._places = places
        self._memory = memory

    def read(
        self, worker: int, params: list[Any], shown: list[Any], sources: NDArray[np.int64]
    ) -> tuple[list[torch.Tensor | None], list[int], list[int]]:
        """Fill a row for each gradient that can be copied as it is.

        Returns:
            All gradients, the indices of those that cannot, and those of shown tensors that somebody else holds
            although another tensor is the gradient.
        """
        grads = [param.grad for param in params]
        held = [i for i, grad in enumerate(grads) if grad is not shown[i] and is_held(shown, i)]
        odd = []
        for i, (grad, place) in enumerate(zip(grads, self._places[worker], strict=True)):
            sources[i] = 0, ABSENT
            if grad is None:
                continue
            if (address := self._address(grad, place)) is None:
                odd.append(i)
            else:
                sources[i] = address, place.nbytes
        return grads, odd, held

    def strays(self, worker: int, tensors: list[Any]) -> list[int]:
        """Indices of those that are not the worker's gradient memory as the parameters see it."""
        pairs = enumerate(zip(tensors, self._places[worker], strict=True))
        return [i for i, (tensor, place) in pairs if self._address(tensor, place) != place.data_ptr()]

    def _address(self, grad: torch.Tensor, place: torch.Tensor) -> int | None:
        if not (is_plain_class(grad) and grad.layout == torch.strided):
            return None
        if grad.dtype != place.dtype or grad.device != place.device or grad.shape != place.shape:
            return None
        if place.numel() == 0:
            return place.data_ptr()
        address: int = grad.data_ptr()
        if (
            grad.stride() != place.stride()
            or grad.is_neg()
            or address == 0
            or not grad.untyped_storage().data_ptr()
        ):
            return None
        inside = address < self._memory.stop and address + place.nbytes > self._memory.start
        return None if inside and address != place.data_ptr() else address


def reader_for(
    core: "_core.Engine", places: Sequence[Sequence[torch.Tensor]], memory: range
) -> "_core.GradientReader | Reader":
    """The compiled reader where torch has the table that it needs."""
    return core.gradient_reader(PLAIN_CLASSES) or Reader(places, memory)
