"""Arrays as JSON: typed, deflated, in base64; ``page/source.js`` unpacks them."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Json = dict[str, Any]
"""A JSON object."""


def packed(values: NDArray[Any]) -> Json:
    """Return an array as a JSON object, without loss.

    Whole numbers at a constant distance become their first one, the distance and the length. All
    other arrays become a type and data. Of the elements, the first bytes of all come first, then
    the second bytes of all, and so on: numbers that are alike then deflate well.

    Args:
        values: Of any shape, which the reader has to know. Floats become "f4" if that keeps each
            of them, else "f8"; booleans "u1"; integers "i4", or "f8" if they need more.
    """
    flat = np.ascontiguousarray(values).ravel()
    if flat.dtype.kind == "i" and len(flat):
        distances = np.diff(flat)
        distance = int(distances[0]) if len(distances) else 1
        if (distances == distance).all():
            return {"first": int(flat[0]), "distance": distance, "length": len(flat)}
    typed = _smallest(flat)
    size = typed.dtype.itemsize
    planes = typed.view(np.uint8).reshape(-1, size).T.tobytes()
    data = base64.b64encode(zlib.compress(planes, 6)).decode()
    return {"type": f"{typed.dtype.kind}{size}", "data": data}


def _smallest(values: NDArray[Any]) -> NDArray[Any]:
    """Return the values in the smallest type, in little-endian order, that keeps them."""
    if values.dtype.kind == "b":
        return values.astype("u1")
    if values.dtype.kind in "iu":
        fits = not len(values) or (values.min() >= -(2**31) and values.max() < 2**31)
        return values.astype("<i4" if fits else "<f8")
    with np.errstate(over="ignore"):  # of values that float32 cannot hold
        single = values.astype("<f4")
    same = np.array_equal(single.astype(np.float64), values, equal_nan=True)
    return single if same else values.astype("<f8")
