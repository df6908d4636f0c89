"""A figure that notebooks show and pyplot does not know of; imports matplotlib."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


class Picture(Figure):
    """A figure with a canvas of its own.

    Args:
        options: As `Figure` takes.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, layout="constrained")
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        """Return what a notebook shows that has not loaded pyplot."""
        content = io.BytesIO()
        self.savefig(content, format="png")
        return content.getvalue()
