"""The measurements of `benchmarks.cuda.run` as Markdown, beside the targets."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.common.markdown import table
from gradclip.engines import engine_for

RIVALS = ("compiled", "apex", "transformer engine", "gradclip", "hook")
TOY = (
    "**No CUDA device: toys on the CPU, timed by the clock. These numbers mean nothing; they show "
    "that the benchmark runs.**"
)
UNDER, UNDER_TINY, CLIPPING, HOST_TINY = 0.40, 0.50, 1.0, 0.50
NORM_SHARE, NORM_BYTES = 0.85, 5e8
TRAINING = 0.01
LOGGED = "GradientClipper with log"


def interpreted() -> bool:
    """Return whether Triton kernels are interpreted, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def machine(device: torch.device) -> dict[str, Any]:
    """Return the device, versions and settings of this machine."""
    on_device = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_device else "cpu",
        "meaningless": not on_device,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "engine": engine_for("auto", device).name,
        "interpreted": interpreted(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each target with its measurement and whether it was met.

    A target without a measurement is not listed.
    """
    results = [target for row in result["rows"] for target in _targets_of(row)]
    if result["training"]:
        overhead = result["training"]["overhead"][LOGGED]
        what = "clip and log, added to a training step"
        results.append(_target(what, "<=", TRAINING, overhead))
    return results


def _targets_of(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    name, regime, tiny = row["set"], row["regime"], row["set"] == "tiny"
    if "gradclip" not in row["device_ratio"]:
        return
    if regime == "norm":
        if row["bytes"] >= NORM_BYTES:
            yield _target(f"{name}, norm, of bandwidth", ">=", NORM_SHARE, row["share"]["gradclip"])
        return
    limit = CLIPPING if regime == "clipping" else UNDER_TINY if tiny else UNDER
    device, host = row["device_ratio"]["gradclip"], row["host_ratio"]["gradclip"]
    yield _target(f"{name}, {regime}, device, of torch's", "<=", limit, device)
    if tiny:
        yield _target(f"{name}, {regime}, host, of torch's", "<=", HOST_TINY, host)


def _target(what: str, sign: str, limit: float, measured: float) -> dict[str, Any]:
    met = measured <= limit if sign == "<=" else measured >= limit
    return {"what": what, "sign": sign, "limit": limit, "measured": measured, "met": met}


def markdown(result: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    about = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    parts = [about]
    if result["machine"]["meaningless"]:
        parts.insert(0, TOY)
    if "copy_bandwidth" in result:
        parts.append(f"copy bandwidth {result['copy_bandwidth'] / 1e9:,.4g} GB/s, read and written")
    if result["rows"]:
        parts += [_device_table(result["rows"]), _host_table(result["rows"])]
    if any(result["missing"].values()):
        parts.append(_missing(result["missing"]))
    if result["training"]:
        parts.append(_training_table(result["training"]))
    if result["targets"]:
        parts.append(_targets_table(result["targets"]))
    return "\n\n".join(parts)


def _device_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of times on the device, as ratios to torch's."""
    first = ["device", "dtype", "regime", "torch, ms"]
    last = ["gradclip, ms", "of bandwidth", "error", "torch's error"]
    return _table(
        [*first, *RIVALS, *last],
        [
            [
                *[row["set"], row["dtype"], row["regime"], f"{row['device_ms']['torch']:.3f}"],
                *[_number(row["device_ratio"].get(name), ".2f") for name in RIVALS],
                _number(row["device_ms"].get("gradclip"), ".3f"),
                _number(row["share"].get("gradclip"), ".0%"),
                *[f"{row['error'][name]:.0e}" for name in ("gradclip", "torch")],
            ]
            for row in rows
        ],
    )


def _host_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of times until the call returns, as ratios to torch's."""
    return _table(
        ["host", "regime", "torch, us", *RIVALS, "gradclip, us", "hook, us"],
        [
            [
                *[row["set"], row["regime"], f"{row['host_us']['torch']:.0f}"],
                *[_number(row["host_ratio"].get(name), ".2f") for name in RIVALS],
                *[_number(row["host_us"].get(name), ".0f") for name in ("gradclip", "hook")],
            ]
            for row in rows
        ],
    )


def _training_table(training: dict[str, Any]) -> str:
    lines = [
        [name, f"{taken:.2f}", f"{training['overhead'][name]:+.1%}"]
        for name, taken in training["ms"].items()
    ]
    parameters, batch, length = (training[key] for key in ("parameters", "batch", "length"))
    what = f"training step of GPT-2, {parameters:,} parameters, {batch} x {length} tokens"
    table = _table([f"{what}, bfloat16 autocast", "ms", "over no clipping"], lines)
    return f"{table}\n\nGradientClipper clipped {training['clipped']:.0%} of its steps."


def _targets_table(results: list[dict[str, Any]]) -> str:
    return _table(
        ["target", "", "measured", "met"],
        [
            [
                result["what"],
                f"{result['sign']} {result['limit']:.2f}",
                f"{result['measured']:.3f}",
                "yes" if result["met"] else "no",
            ]
            for result in results
        ],
    )


def _missing(reasons_by_set: dict[str, dict[str, str]]) -> str:
    """Return the list of missing rivals, with each reason once."""
    sets: dict[tuple[str, str], list[str]] = {}
    for name, reasons in reasons_by_set.items():
        for rival, why in reasons.items():
            sets.setdefault((rival, why), []).append(name)
    lines = [f"- {rival} ({', '.join(names)}): {why}" for (rival, why), names in sets.items()]
    return "\n".join(["Not measured:", "", *lines])


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(table(names, rows))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
