"""Reading pickles and files of ``torch.save`` without running any code that they refer to."""

import os
import pickle
import warnings
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any, ContextManager, List, Set, Tuple

import numpy as np
import torch

from balanced_d2.utils.errors import UserError

Names = Set[Tuple[str, str]]

ARRAYS: Names = {
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")  # NumPy 1 and 2
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    ),
    *(("numpy", name) for name in ("ndarray", "dtype")),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
}
"""The functions and classes that a pickle of NumPy arrays in plain containers refers to."""


def check_arrays(path: str) -> None:
    """Check that a pickle contains nothing but NumPy arrays and plain containers.

    Raises:
        pickle.UnpicklingError: if it refers to anything else, which is then not called.
    """

    class ArraysOnly(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) not in ARRAYS:
                raise pickle.UnpicklingError(
                    f"it contains {module}.{name}, but only arrays and plain containers are allowed"
                )
            return super().find_class(module, name)

    with open(path, "rb") as file:
        ArraysOnly(file, encoding="latin1").load()


def numpy_allowed() -> ContextManager[None]:
    """Context manager in which ``torch.load`` also reads NumPy's numbers and arrays, which hooks
    may have in their state."""
    # Their functions are in numpy.core.multiarray, and from NumPy 2 on in numpy._core.
    functions = [value.__reduce__()[0] for value in (np.float64(0), np.zeros(0))]
    kinds = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + "?efdgFDGSU"}
    allowed: List[Any] = [*functions, np.ndarray, np.dtype, *kinds]
    return torch.serialization.safe_globals(allowed)


def load_inert(path: str) -> object:
    """Read a file of ``torch.save``, in the current format or that from before PyTorch 1.6.

    Only tensors, ``OrderedDict`` and the types built into the pickle format are created.
    Everything else in the file, such as the state of an optimizer or logger, becomes an empty
    stand-in, and no other function is ever called. ``torch.load(weights_only=True)`` runs no code
    either, but refuses the whole file if it has objects of other projects.

    Returns:
        The object, with its tensors on the CPU.

    Raises:
        UserError: if the file does not exist or has another format.
    """
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}")
    try:
        if _is_torchscript(path):  # torch.load would pass it to another reader
            raise UserError(f"{path} is a TorchScript model, not a checkpoint")
        with warnings.catch_warnings():  # about the old format's storages
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", pickle_module=_INERT, weights_only=False)
    except UserError:
        raise
    except Exception as error:  # a file of another format can fail in any way
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(f"{path} is not a PyTorch checkpoint, or is damaged: {reason}") from error


def _is_torchscript(path: str) -> bool:
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
        file.seek(0)
        # torch.load's own reader, so that both always see the same names.
        return "constants.pkl" in torch._C.PyTorchFileReader(file).get_all_records()


def _nothing(*args, **kwargs) -> None:
    pass


class Nothing:
    """Stands in for any object, class or function; accepts everything an unpickler does to it."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __call__(self, *args, **kwargs):
        return self

    __init__ = __setstate__ = __setitem__ = append = extend = add = _nothing


def _sealed(function):
    # A pickle can set attributes of what it refers to, but this way not of PyTorch's function.
    return lambda *args: function(*args)


# What a file of tensors in plain containers refers to; torch.load finds the storage types itself.
_TENSORS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    **{
        ("torch._utils", name): _sealed(getattr(torch._utils, name))
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
    },
    **{
        ("torch", name): value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype)
    },
}


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        return _TENSORS.get((module, name), Nothing)


def _load(file, **kwargs) -> object:
    return _InertUnpickler(file, **kwargs).load()


# The parts of the module pickle that torch.load uses.
_INERT = SimpleNamespace(__name__="inert_pickle", Unpickler=_InertUnpickler, load=_load)
