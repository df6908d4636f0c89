"""The events at the start of a TensorBoard log: chart layout and settings of the clipper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from .event_files import text

CHARTS = {
    "norm before and after, threshold": "pre|post|threshold",
    "clip rate": "clip_rate|micro_batch_clip_rate",
    "steps not finite, steps skipped": "nonfinite_steps|skipped_steps|nonfinite_micro_batches",
}
"""Titles of the charts, each with the curves it overlays."""
CHARTS_WITH_LOSS = {**CHARTS, "loss": "loss"}
"""The same where steps have a loss."""


def opening_events(
    step: int,
    wall_time: float,
    prefix: str,
    prefixes: Iterable[str],
    settings: Mapping[str, str],
    charts: Mapping[str, str] = CHARTS,
) -> list[Event]:
    """Return the events that come once before the curves of a clipper.

    Args:
        step: Index of the first step.
        wall_time: When it was taken.
        prefix: Prefix of the clipper's tags.
        prefixes: Prefixes of all clippers of the run, since only the last layout of a run counts.
        settings: Settings of the clipper by name.
        charts: Titles of the charts, each with its curves.
    """
    content = layout(prefixes, charts).SerializeToString()
    values = [
        Summary.Value(
            tag=metadata.CONFIG_SUMMARY_TAG,
            metadata=metadata.create_summary_metadata(),
            tensor=TensorProto(dtype=DT_STRING, string_val=[content]),
        )
    ]
    if settings:
        values.append(text(f"{prefix}/settings", _table(settings)))
    return [Event(step=step, wall_time=wall_time, summary=Summary(value=values))]


def layout(prefixes: Iterable[str], charts: Mapping[str, str] = CHARTS) -> layout_pb2.Layout:
    """Return the charts of several clippers, one category each."""
    return layout_pb2.Layout(
        category=[
            layout_pb2.Category(
                title=prefix,
                chart=[
                    layout_pb2.Chart(
                        title=title,
                        multiline=layout_pb2.MultilineChartContent(tag=[f"^{prefix}/({curves})$"]),
                    )
                    for title, curves in charts.items()
                ],
            )
            for prefix in prefixes
        ]
    )


def _table(settings: Mapping[str, str]) -> str:
    """Return a table in Markdown."""
    rows = [f"| {name} | {value.replace('|', '&#124;')} |" for name, value in settings.items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows])
