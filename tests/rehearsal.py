"""A second device to rehearse on where there is no accelerator. What would fail on a GPU fails here.

It is computed on the CPU, and refuses what an accelerator refuses: to meet tensors of the CPU in one operation (other
than single numbers), `.numpy()` without `force=True`, indices on the wrong side, and double precision, which Apple's
GPUs do not have. To PyTorch it is a device of its own, called "rehearsal", by the way that PyTorch keeps for devices
written in Python. Such a device can't be unregistered; only within `accelerator()` does it count as available.
"""

import contextlib

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
CPU = torch.device("cpu")
DOUBLE = (torch.float64, torch.complex128)
COPIES = (aten.copy_.default, aten._to_copy.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)

_available = False


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self):
        return _available

    def is_built(self):
        return True

    def has_primary_context(self, device_index):
        return True


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self):
        return torch._C._autograd.DeviceType.PrivateUse1


class _Module(_DummyBackendModule):
    def is_available(self):
        return _available

    def device_count(self):
        return int(_available)

    def get_rng_state(self, device=None):
        return torch.get_rng_state()  # it draws from the CPU's generator

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


class Rehearsed(torch.Tensor):
    """A tensor on the rehearsal device; its values are those of `here`, a tensor of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )

    def __init__(self, here):
        self.here = here

    def __repr__(self, **options):
        return f"{self.here!r} on {DEVICE}"

    def __format__(self, form):
        return format(self.here, form)

    def numpy(self, *, force=False):
        if not force:
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() to copy it first.")
        return self.here.numpy(force=True)

    def tolist(self):
        return self.here.tolist()

    def __tensor_flatten__(self):
        return ["here"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Rehearsed(inner["here"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    """Carries an operation out on the CPU, if all that takes part in it is on one device."""
    if func is aten._fused_sdp_choice.default:
        return 0  # by its formula
    tensors = [one for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor)]
    there = [one for one in tensors if isinstance(one, Rehearsed)]
    strange = [one for one in tensors if not isinstance(one, Rehearsed) and one.ndim]
    if func in INDEXED:  # indices may be on the CPU, as with CUDA; what is put in may not
        strange = [one for one in tree_iter((args[0], args[2:])) if any(one is other for other in strange)]
        if there and not isinstance(args[0], Rehearsed):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if there and strange and func not in COPIES:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{DEVICE} and cpu! (when calling {func})"
        )
    target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    to_rehearsal = target.type == DEVICE.type if target else bool(there)
    if func is aten.copy_.default:
        to_rehearsal = isinstance(args[0], Rehearsed)
    given = {**kwargs, "device": CPU} if target else dict(kwargs)
    given.pop("generator", None)
    if "pin_memory" in given:
        given["pin_memory"] = False
    args_here, given = tree_map(lambda one: one.here if isinstance(one, Rehearsed) else one, (args, given))
    out = func(*args_here, **given)
    if not to_rehearsal:
        return out
    double = next((one for one in tree_iter(out) if isinstance(one, torch.Tensor) and one.dtype in DOUBLE), None)
    if double is not None:
        raise TypeError(f"Cannot convert a tensor on {DEVICE} to {double.dtype}: the device has single precision only.")
    out = tree_map(lambda one: Rehearsed(one) if type(one) is torch.Tensor else one, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there else out


class _Made(TorchFunctionMode):
    """Makes tensors of lists and arrays on the CPU, which PyTorch can't do itself for such a device.

    They are moved there if they are asked for; as indices they may stay.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(one) if isinstance(one, (list, np.ndarray)) else one for one in index)
            return func(args[0], index, *args[2:])
        if func is torch.Tensor.new_tensor:
            func, args, kwargs = torch.tensor, args[1:], {"dtype": args[0].dtype, "device": args[0].device, **kwargs}
        if func not in (torch.tensor, torch.as_tensor, torch.asarray, torch.eye):
            return func(*args, **kwargs)
        device = kwargs.pop("device", None)
        made = func(*args, **kwargs)
        return made if device is None else made.to(device)


_setup_privateuseone_for_python_backend("rehearsal", _Module(), _Hooks(), _Guard())
DEVICE = torch.device("rehearsal:0")
_library = torch.library.Library("_", "IMPL")
_library.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")


@contextlib.contextmanager
def accelerator():
    """Within, the rehearsal device is what `torch.accelerator` finds."""
    global _available
    with torch.autograd.set_multithreading_enabled(False), _Made():
        _available = True
        try:
            yield DEVICE
        finally:
            _available = False
