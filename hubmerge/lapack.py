"""Eigenvectors of symmetric matrices on the CPU, by the LAPACK that SciPy brings.

torch has only the driver that computes all eigenvectors, in a library that is slow on processors of other makers.
SciPy's own functions keep the interpreter's lock while they compute, which would stop every other thread; so its
routines are called by the addresses that it publishes for Cython.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

_LETTER = {torch.float32: "s", torch.float64: "d"}
_REAL = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}
_SOME = 0.6
"""Of all eigenvectors: for more, it is as fast to compute all by divide and conquer."""
_LARGEST = 32_000
"""Rows; the sizes of workspaces are 32-bit numbers."""


def eigenpairs(matrix: torch.Tensor, k: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest eigenvalues of a symmetric matrix and their eigenvectors, the largest first.

    Args:
        matrix: (n, n), n ≥ 1, float32 or float64, finite.
        k: How many, at least one; all by default.

    Returns:
        Values (k,), vectors (n, k).

    Raises:
        torch.linalg.LinAlgError: No convergence.
    """
    n = len(matrix)
    k = n if k is None else k
    found = None
    if matrix.device.type == "cpu" and n <= _LARGEST:
        found = _some(matrix, k) if k <= _SOME * n else _all(matrix)
    values, vectors = torch.linalg.eigh(matrix) if found is None else found
    return values[-k:].flip(0), vectors[:, -k:].flip(1)


def _all(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """All eigenpairs, ascending, by divide and conquer; None without convergence."""
    n = len(matrix)
    vectors, values = matrix.clone(memory_format=torch.contiguous_format), matrix.new_empty(n)
    reals, integers = matrix.new_empty(1 + 6 * n + 2 * n * n), torch.empty(3 + 5 * n, dtype=torch.int32)
    workspace = (reals, len(reals), integers, len(integers))
    converged = _call("syevd", matrix.dtype, "V", "L", n, vectors, n, values, *workspace)
    return (values, vectors.T) if converged else None


def _some(matrix: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The k largest eigenpairs, ascending, by relatively robust representations; None if they are not all found."""
    n = len(matrix)
    scratch, values = matrix.clone(memory_format=torch.contiguous_format), matrix.new_empty(n)
    vectors, support = matrix.new_empty(k, n), torch.empty(2 * n, dtype=torch.int32)
    found = torch.zeros(1, dtype=torch.int32)
    reals, integers = matrix.new_empty(80 * n), torch.empty(10 * n, dtype=torch.int32)
    workspace = (reals, len(reals), integers, len(integers))
    wanted = (0.0, 0.0, n - k + 1, n, 0.0)  # by rank, counted from 1; not by value
    converged = _call(
        "syevr", matrix.dtype, "V", "I", "L", n, scratch, n, *wanted, found, values, vectors, n, support, *workspace
    )
    return (values[:k], vectors.T) if converged and int(found) == k else None


def _call(name: str, dtype: torch.dtype, *arguments: Any) -> bool:
    """Run a routine whose last argument, which is not among these, tells what went wrong; whether nothing did."""
    routine, problem = _routine(_LETTER[dtype] + name, len(arguments) + 1), ctypes.c_int()
    with _THREADS:
        routine(*(_by_address(a, _REAL[dtype]) for a in arguments), ctypes.byref(problem))
    return problem.value == 0


def _by_address(value: Any, real: Callable[[float], Any]) -> Any:
    """As Fortran takes everything: letters, numbers, and tensors."""
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, str):
        return ctypes.byref(ctypes.c_char(value.encode()))
    return ctypes.byref(ctypes.c_int(value) if isinstance(value, int) else real(value))


@cache
def _routine(name: str, arguments: int) -> Callable[..., None]:
    from scipy.linalg import cython_lapack  # takes a third of a second, for which few merges have a use

    capsule = cython_lapack.__pyx_capi__[name]
    name_of, address_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    address_of.restype, address_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    # A function of this type lets go of the interpreter's lock.
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(address_of(capsule, name_of(capsule)))


class _Threads:
    """While anyone is inside, SciPy's OpenBLAS uses as many threads as torch does in the first who came.

    Its number of threads is one for the whole process. Another library than OpenBLAS is left as it is.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = _openblas("get")()
                _openblas("set")(torch.get_num_threads())
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                _openblas("set")(self._before)


_THREADS = _Threads()


@cache
def _openblas(verb: str) -> Callable[..., int]:
    from scipy.linalg import cython_lapack

    library = ctypes.CDLL(cython_lapack.__file__)  # finds the functions of what that is linked to, too
    found: Callable[..., int] = getattr(library, f"scipy_openblas_{verb}_num_threads", lambda *_: 0)
    return found
