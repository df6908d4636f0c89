"""Arrays of the page's answers, unpacked as the page does it."""

import base64
import zlib
from typing import Any

import numpy as np


def unpacked(packed: dict[str, Any]) -> np.ndarray:
    """Return the values of a packed array, flat."""
    if "data" not in packed:
        return packed["first"] + packed["distance"] * np.arange(packed["length"])
    size = int(packed["type"][1:])
    planes = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), np.uint8)
    return planes.reshape(size, -1).T.copy().view(f"<{packed['type']}").ravel()
