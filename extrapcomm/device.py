"""Which device an engine works on, and on which of its streams."""

import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

from . import _core
from .errors import DeviceError, UsageError

__all__ = ["core_on", "device_for", "require_device"]


def require_device(device: str, name: str) -> None:
    """DeviceError if arrays there cannot be trained with this build."""
    if device == "cpu":
        return
    if not device.startswith("cuda"):
        raise DeviceError(f"{name} is on {device}; extrapcomm works on CPUs and on CUDA devices")
    if find_spec("extrapcomm._cuda") is None:
        raise DeviceError(
            f"{name} is on {device}, and this build of extrapcomm has no CUDA part: put nvcc on PATH and install it "
            "anew (pip install --force-reinstall --no-cache-dir extrapcomm)"
        )


def device_for(places: Sequence[str]) -> "_core.Device | None":
    """The device that all these arrays lie on; None for the CPU.

    XC_DEVICE=host in the environment runs the kernels of a GPU on the CPU, on arrays in the CPU's memory: for tests.

    Raises:
        UsageError: if they lie on several.
        DeviceError: if the device cannot be used.
    """
    if len(set(places)) > 1:
        raise UsageError(
            f"one engine's arrays must all lie on one device, not on {', '.join(sorted(set(places)))}"
        )
    place = places[0] if places else "cpu"
    if place != "cpu":
        return cuda_device(place)
    return _core.HostDevice() if os.environ.get("XC_DEVICE") == "host" else None


@cache
def cuda_device(place: str) -> "_core.Device":
    """The GPU that torch and CuPy call by this name."""
    return cast(_core.Device, import_module("extrapcomm._cuda").device(int(place.partition(":")[2] or 0)))


def core_on(device: "_core.Device | None", library: str, core: "_core.Engine") -> "_core.Engine":
    """The engine itself on the CPU; on a GPU one that queues its work on the caller's current stream."""
    if device is None or device.name == "host":
        return core
    return cast(_core.Engine, OnStream(core, device, _stream_of(library, device.name)))


class OnStream:
    """An engine on a GPU: each call goes to the stream that is current at that moment.

    Args:
        core: the engine.
        device: where it is.
        stream: gives the current stream's address.
    """

    def __init__(self, core: "_core.Engine", device: "_core.Device", stream: Callable[[], int]) -> None:
        self._core, self._device, self._stream = core, device, stream

    def __getattr__(self, name: str) -> Any:
        self._device.use(self._stream())
        return getattr(self._core, name)


def _stream_of(library: str, place: str) -> Callable[[], int]:
    if library == "torch":
        torch = import_module("torch")
        return lambda: int(torch.cuda.current_stream(place).cuda_stream)
    if library == "cupy":
        cupy = import_module("cupy")
        return lambda: int(cupy.cuda.get_current_stream().ptr)
    return lambda: 0  # the legacy default stream, which all others wait for
