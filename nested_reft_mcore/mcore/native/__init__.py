"""The native decoding kernels, for float32 on x86 CPUs: finding, loading and calling them.

`setup.py` builds them where there is a compiler. They have a plain C interface and take addresses.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_double, c_int64, c_void_p
from pathlib import Path

MAX_BLOCK = 64
"""Tokens that a product takes at once, at most; `kBlock` of products.h."""


class Layer(ctypes.Structure):
    """Addresses of one layer's parameters, null where it has none."""

    _fields_ = [
        (name, c_void_p)
        for name in (
            *("attention_norm", "qkv", "qkv_bias", "query_norm", "key_norm", "projection"),
            *("mlp_norm", "gate_and_up", "down"),
        )
    ]


class Pass(ctypes.Structure):
    """Shapes, addresses and extents of one pass; records.h explains the fields."""

    _fields_ = [
        *(
            (name, c_int64)
            for name in (
                *("hidden_size", "groups", "heads_per_group", "head_dim", "ffn_size", "threads"),
                *("num_tokens", "num_runs", "num_queries", "num_query_runs"),
                *("num_copies", "length", "accumulate"),
            )
        ),
        *(
            (name, c_void_p)
            for name in (
                *("runs", "copies", "cosine", "sine", "hidden", "output"),
                *("qkv", "context", "columns", "activations"),
            )
        ),
        ("epsilon", c_double),
    ]


class Unavailable(Exception):
    """The kernels are not there, or this processor cannot run them; says why."""


@functools.cache
def load_kernels() -> ctypes.CDLL:
    """The library with its functions declared.

    Raises Unavailable with the reason.
    """
    files = sorted(Path(__file__).parent.glob("_decode_kernels*.so"))
    if not files:
        raise Unavailable("not built: there was no C++ compiler when the package was installed")
    try:
        library = ctypes.CDLL(str(files[0]))
    except OSError as error:
        raise Unavailable(f"cannot be loaded: {error}") from error
    if not library.decode_kernels_supported():
        raise Unavailable("this processor has no AVX2 and FMA")
    pointer = c_void_p
    library.decode_fits.argtypes = [pointer, c_int64]
    library.decode_attention.argtypes = [pointer, pointer, pointer, pointer]
    library.decode_mlp.argtypes = [pointer, pointer]
    library.decode_linear.argtypes = [*[pointer] * 5, *[c_int64] * 3, c_double, c_int64]
    for function in (library.decode_attention, library.decode_mlp, library.decode_linear):
        function.restype = None
    return library


def problem() -> str | None:
    """Why the kernels cannot be used here; None where they can."""
    try:
        load_kernels()
    except Unavailable as error:
        return str(error)
    return None
