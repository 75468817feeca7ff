"""Which device an engine works on, and on which of its streams."""

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from . import _core
from .errors import DeviceError, UsageError
from .placement import Gpu, sharing_warning

if TYPE_CHECKING:
    from .world import World

__all__ = [
    "core_on",
    "cuda_part",
    "device_for",
    "gpus_here",
    "require_device",
    "title_on",
    "warn_of_shared_gpu",
]

log = logging.getLogger("extrapcomm")


def require_device(device: str, name: str) -> None:
    """DeviceError if arrays there cannot be trained with this build."""
    if device == "cpu":
        return
    if not device.startswith("cuda"):
        raise DeviceError(f"{name} is on {device}; extrapcomm works on CPUs and on CUDA devices")
    if not has_cuda_part():
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
    device: _core.Device = cuda_part().device(_number(place))
    return device


def has_cuda_part() -> bool:
    """Whether it was built."""
    return find_spec("extrapcomm._cuda") is not None


def cuda_part() -> Any:
    """The compiled module for GPUs, or None."""
    return import_module("extrapcomm._cuda") if has_cuda_part() else None


def gpus_here() -> list[Gpu]:
    """Those that this process sees, in CUDA's order."""
    part = cuda_part()
    count = part.device_count() if part else 0
    return [{"id": part.identify(i), "name": part.describe(i)} for i in range(count)]


def _number(place: str) -> int:
    return int(place.partition(":")[2] or 0)


def _is_gpu(device: "_core.Device | None") -> bool:
    return device is not None and device.name != "host"


def title_on(title: str, device: "_core.Device | None") -> str:
    """What ranks compare before they construct: it tells those with a GPU from those without."""
    return f"{title} on a GPU" if _is_gpu(device) else title


def warn_of_shared_gpu(world: "World", device: "_core.Device | None") -> None:
    """Collective once the ranks know that all or none of them have a GPU: a warning if some have the same, once."""
    if device is None or not _is_gpu(device) or world.size == 1:
        return
    gpus = world.gather_words(cuda_part().identify(_number(device.name)))
    if world.rank == 0:
        _warn_once(sharing_warning(gpus))


@cache
def _warn_once(text: str | None) -> None:
    if text:
        log.warning(text)


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
