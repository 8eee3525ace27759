"""A GPU that is none: tensors that say they are on `cuda`, compute on the host, and do not mix.

What goes wrong on a GPU and on no CPU is mostly of three kinds, and all raise here as they would
there: numpy is asked for of a tensor that is not on the host; an operation is given tensors of two
devices; the data of one is read by code that runs on the host. How fast something is, and what its
last digits are, this does not tell.

    with pretended_gpu() as device:
        model.to(device)

Whole chapters run on it where Jupyter's kernels start with it:

    export IPYTHONDIR=$(python tests/pretended_gpu.py FOLDER) SCFM_RESULTS=FOLDER/results
    make notebooks PROFILE=smoke
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda:0")
MEMORY = 80 << 30
"""Bytes that it says are free."""
_aten = torch.ops.aten
_ACROSS = {_aten._to_copy.default, _aten.copy_.default}
"""Operations that take tensors of two devices."""
_INDEXING = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default,
             _aten._index_put_impl_.default}
"""Operations whose indices may be on the host."""


class OnGpu(Tensor):
    """A tensor on the pretended GPU; `inner` is the real one."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGpu":
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="cpu", requires_grad=False)
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.inner!r})"

    def cpu(self) -> Tensor:  # type: ignore[override]
        return self.inner.clone()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()  # by which those who save weights tell tied ones

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu()")

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict) -> "OnGpu":
        made = OnGpu(self.inner.clone())
        return torch.nn.Parameter(made, requires_grad=False) if getattr(
            self, "_is_param", False) else made  # type: ignore[return-value]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        check_devices(func, args, kwargs or {})
        found = func(*tree_map(_inner, args), **tree_map(_inner, dict(kwargs or {})))
        if func._schema.is_mutable and isinstance(found, Tensor):  # in place: the tensor itself
            return args[0]
        return tree_map(_outer, found)


def _inner(one: Any) -> Any:
    return one.inner if isinstance(one, OnGpu) else one


def _outer(one: Any) -> Any:
    return OnGpu(one) if isinstance(one, Tensor) and not isinstance(one, OnGpu) else one


def check_devices(func: Any, args: Any, kwargs: Any) -> None:
    """RuntimeError for tensors of two devices, but for what CUDA takes: numbers (0-dim tensors on
    the host), indices, and copies from one device to the other."""
    if func in _ACROSS:
        return
    if func in _INDEXING:
        args = [args[0], *args[2:]]
    given = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
    host = [one for one in given if not isinstance(one, OnGpu) and one.ndim]
    if host and len(host) < len(given):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} was given "
                           "some on cuda:0 and some on cpu")


def _on_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _Generator(torch.Generator):
    """A generator for any device, on the host."""

    def __new__(cls, device: Any = None) -> "_Generator":
        return super().__new__(cls)


class _Factories(TorchFunctionMode):
    """Sends what is asked for `device=cuda` to the pretended one."""

    def __torch_function__(self, func: Callable, types: Any, args: Sequence[Any] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("to", "cuda") and isinstance(args[0], Tensor):
            return self._moved(func, args, kwargs)
        if name in ("matmul", "__matmul__") and args[0].ndim == 1 and args[1].ndim > 1:
            return (args[0][None] @ args[1]).squeeze(-2)  # else it is squeezed in place, unseen
        if name == "one_hot" and isinstance(args[0], OnGpu):  # makes a tensor that it does not tell
            return _outer(func(*tree_map(_inner, tuple(args)), **kwargs))
        wanted = kwargs.get("device")
        if _on_gpu(wanted):
            kwargs["device"] = "cpu"
            args = tree_map(_inner, tuple(args))
            return tree_map(_outer, func(*args, **kwargs))
        return func(*args, **kwargs)

    def _moved(self, func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """`Tensor.to` in all its forms."""
        own, rest = args[0], list(args[1:])
        target = own.device
        if func.__name__ == "cuda":
            target, rest = DEVICE, []
        for place, one in enumerate(rest):
            if isinstance(one, Tensor):
                target, rest[place] = one.device, one.dtype
            elif isinstance(one, (torch.device, str)):
                target, rest[place] = torch.device(one), torch.device("cpu")
        if kwargs.get("device") is not None:
            target, kwargs["device"] = torch.device(kwargs["device"]), "cpu"
        if isinstance(own, OnGpu) and _on_gpu(target):  # for autograd, not as a copy
            return func(own, *rest, **kwargs) if rest or kwargs else own
        inner = func(_inner(own), *rest, **kwargs) if rest or kwargs else _inner(own)
        if _on_gpu(target) != isinstance(own, OnGpu) and inner is _inner(own):
            inner = inner.clone()  # another device has a memory of its own
        return OnGpu(inner) if _on_gpu(target) else inner


def _applied(module: torch.nn.Module, *given: Any, _apply: Callable = torch.nn.Module._apply,
             **more: Any) -> torch.nn.Module:
    """`Module._apply` (of `to`, `float`), which makes new parameters here: tied ones stay one."""
    before = {name: id(one) for name, one in module.named_parameters(remove_duplicate=False)}
    _apply(module, *given, **more)
    after = dict(module.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, one in before.items():
        if (known := first.setdefault(one, name)) != name:
            owner, _, own = name.rpartition(".")
            setattr(module.get_submodule(owner), own, after[known])
    return module


@contextlib.contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """Within the block `cuda` is pretended; gives the device."""
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with (_Factories(), mock.patch("torch.Generator", _Generator),
              mock.patch("torch.nn.Module._apply", _applied)):
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)


_FOR_EVER = contextlib.ExitStack()


def pretend() -> None:
    """From here on, and as long as the process lives, `cuda` is there, and pretended.

    What only makes training faster is missed, said and done without: compilers and their kernels.
    """
    _FOR_EVER.enter_context(pretended_gpu())
    for name, found in {"is_available": True, "device_count": 1, "current_device": 0,
                        "get_device_name": "a pretended GPU", "set_device": None,
                        "synchronize": None, "mem_get_info": (MEMORY, MEMORY)}.items():
        mock.patch(f"torch.cuda.{name}", return_value=found).start()
    mock.patch("torch.Tensor.pin_memory", lambda tensor, *_: tensor).start()


def main(folder: str) -> None:
    """Write what IPython's kernels start with, and say where."""
    start = Path(folder).resolve() / "ipython" / "profile_default" / "startup"
    start.mkdir(parents=True, exist_ok=True)
    (start / "pretend.py").write_text(
        f"import sys\nsys.path.append({str(Path(__file__).resolve().parent)!r})\n"
        "import pretended_gpu\npretended_gpu.pretend()\n", encoding="utf-8")
    print(start.parents[1])


if __name__ == "__main__":
    main(sys.argv[1])
