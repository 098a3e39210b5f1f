"""Pickles of strangers, read without running what they name.

A pickle can call anything, and a malformed one can crash even NumPy's own unpickling. So these here call nothing but
the stand-ins below, which check what they are given; opcodes that course files have no use for are left out.
"""

import pickle
import re
import struct
from typing import ClassVar, NoReturn

import numpy as np

# What to do about a file that another library wrote.
CONVERT = "save its columns by np.savez('codes.npz', k=k, m=m, P=P, height=height), as the README shows"


class _Admitted:
    """A function that a pickle may call and not change."""

    def __init__(self, call) -> None:
        self._call = call

    def __call__(self, *arguments):
        return self._call(*arguments)

    def __setstate__(self, state) -> NoReturn:
        raise pickle.UnpicklingError("it would change what it calls")


class _Dtype:
    """Stands in for numpy.dtype: plain numbers of at most eight bytes."""

    def __init__(self, code: str, *_) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def read(self, raw: bytes) -> np.ndarray:
        if not re.fullmatch("[biuf][1248]", self.code):
            raise pickle.UnpicklingError(f"it holds an array of dtype {self.code!r}, expected numbers")
        return np.frombuffer(raw, np.dtype(self.code).newbyteorder(self.order))


class Array:
    """Stands in for numpy.ndarray."""

    def __init__(self, values: np.ndarray) -> None:
        self.array = values

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self.array = dtype.read(raw).reshape(shape, order="F" if fortran else "C")


_PICKLE_MAY_CALL = {
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Admitted(lambda text, encoding: text.encode({"latin1": "latin1"}[encoding])),
}
for _core in ("numpy.core", "numpy._core"):
    _PICKLE_MAY_CALL |= {
        (f"{_core}.multiarray", "_reconstruct"): _Admitted(lambda kind, shape, code: Array(np.empty(0))),
        (f"{_core}.multiarray", "scalar"): _Admitted(lambda dtype, raw: dtype.read(raw).item()),
        (f"{_core}.numeric", "_frombuffer"): _Admitted(
            lambda raw, dtype, shape, order: Array(dtype.read(raw).reshape(shape, order=order))
        ),
    }


class PlainUnpickler(pickle._Unpickler):
    """Admits numbers, strings, plain containers and arrays and scalars of numbers; refuses all else by its name."""

    dispatch: ClassVar = {
        opcode: load
        for opcode, load in pickle._Unpickler.dispatch.items()
        if load.__name__.removeprefix("load_")
        not in ("persid", "binpersid", "ext1", "ext2", "ext4", "inst", "obj", "newobj", "newobj_ex")
    }

    def load_bytearray8(self) -> None:
        # The original makes room for what the length says before it finds that the file is shorter.
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(length))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def find_class(self, module: str, name: str):
        if (library := module.split(".")[0]) in ("pandas", "joblib"):
            raise pickle.UnpicklingError(f"it holds an object of {library}; {CONVERT}")
        if (module, name) not in _PICKLE_MAY_CALL:
            raise pickle.UnpicklingError(f"it names {module}.{name}, expected numbers and arrays of numbers alone")
        return _PICKLE_MAY_CALL[module, name]
