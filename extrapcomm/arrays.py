"""Arrays of other libraries: what they are, and looks at shared memory in their own type."""

import ctypes
import math
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from . import _core
from .device import require_device
from .errors import UsageError

__all__ = ["Form", "copy_into", "dense_strides", "form_of", "look_at", "require_visible"]


DLPACK_CPU, DLPACK_CUDA = 1, 2


class Form(NamedTuple):
    """What an array is, apart from its values."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    library: str  # "numpy", "torch", "cupy" or "dlpack"
    device: str = "cpu"  # or "cuda:0"


def form_of(array: Any, name: str = "the array") -> Form:
    """The form of a NumPy array, a torch tensor or any object with DLPack.

    Raises:
        UsageError: for element types other than the four floating types, and things that are no arrays.
        DeviceError: for arrays that are neither in the CPU's memory nor in that of a GPU that this build works on.
    """
    if isinstance(array, np.ndarray):
        steps = tuple(s // array.itemsize for s in array.strides)
        form = Form(array.dtype.name, array.shape, steps, "numpy")
    elif is_torch(array):
        form = _form_of_tensor(array, name)
    elif hasattr(array, "__dlpack__"):
        form = _form_of_dlpack(array, name)
    else:
        raise UsageError(
            f"{name} must be a NumPy array, a torch tensor or a DLPack producer, not {type(array).__name__}"
        )
    if form.dtype not in _core.dtypes():
        raise UsageError(
            f"{name} has elements of type {form.dtype}; possible are {', '.join(_core.dtypes())}"
        )
    return form._replace(strides=dense_strides(form.shape, form.strides))


def is_torch(array: Any) -> bool:
    """Whether this is a torch tensor, without loading torch for the question."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _form_of_tensor(tensor: Any, name: str) -> Form:
    import torch

    if tensor.layout != torch.strided:
        raise UsageError(f"{name} is sparse ({tensor.layout}); only dense tensors can be trained")
    require_device(str(tensor.device), name)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Form(dtype, tuple(tensor.shape), tuple(tensor.stride()), "torch", str(tensor.device))


def _form_of_dlpack(array: Any, name: str) -> Form:
    kind, number = (int(part) for part in array.__dlpack_device__())
    device = {DLPACK_CPU: "cpu", DLPACK_CUDA: f"cuda:{number}"}.get(kind, f"a device of DLPack's type {kind}")
    require_device(device, name)
    _, dtype, shape, strides, *_ = _core.describe_dlpack(array.__dlpack__())
    library = "cupy" if type(array).__module__.partition(".")[0] == "cupy" else "dlpack"
    return Form(dtype, tuple(shape), tuple(strides) if strides else _contiguous(shape), library, device)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def dense_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """The strides themselves if the elements fill their memory without gap or overlap, else contiguous ones.

    >>> dense_strides((2, 3), (1, 2)), dense_strides((2, 3), (6, 1))
    ((1, 2), (3, 1))
    """
    expected = 1
    for stride, extent in sorted(zip(strides, shape, strict=True)):
        if extent == 0:
            return _contiguous(shape)
        if extent > 1:
            if stride != expected:
                return _contiguous(shape)
            expected *= extent
    return tuple(strides) if all(s > 0 for s in strides) else _contiguous(shape)


def look_at(view: "_core.View", library: str) -> Any:
    """Shared memory as an array of the given library; NumPy sees bfloat16 through ml_dtypes, or else as uint16."""
    if library == "torch":
        import torch
        from torch.utils.dlpack import from_dlpack

        with torch.inference_mode(False):  # whose tensors nobody may write into later
            return from_dlpack(view)
    if library == "cupy":
        return import_module("cupy").from_dlpack(view)
    if view.dtype != "bfloat16":
        return np.asarray(view)
    if find_spec("ml_dtypes") is None:
        return view.as_bits()
    return view.as_bits().view(import_module("ml_dtypes").bfloat16)


def require_visible(form: Form) -> None:
    """UsageError if NumPy could only show the bits of such an array."""
    if form.dtype == "bfloat16" and form.library != "torch" and find_spec("ml_dtypes") is None:
        raise UsageError("NumPy sees bfloat16 through the package ml_dtypes, which is not installed")


def copy_into(view: "_core.View", array: Any) -> None:
    """Copy an array's values into shared memory of the same form."""
    if is_torch(array):
        look_at(view, "torch").copy_(array.detach())
    elif type(array).__module__.partition(".")[0] == "cupy":
        look_at(view, "cupy")[...] = array
    elif view.dtype == "bfloat16":
        view.as_bits()[...] = _bits_of(array)
    else:
        np.asarray(view)[...] = array if isinstance(array, np.ndarray) else np.from_dlpack(array)


def _bits_of(array: Any) -> Any:
    """The 16-bit elements of an array whose type NumPy may not know, as uint16."""
    if isinstance(array, np.ndarray):
        return array.view(np.uint16)
    address, _, shape, given, *_ = _core.describe_dlpack(array.__dlpack__())
    strides = given or _contiguous(shape)
    if 0 in shape:
        return np.empty(shape, np.uint16)
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    flat = np.ctypeslib.as_array((ctypes.c_uint16 * extent).from_address(address))
    return np.lib.stride_tricks.as_strided(flat, shape, [2 * s for s in strides])
