"""TensorBoard's tab "Gradients", which it finds by the entry point of this package.

TensorBoard imports this module when it starts. All else is imported when somebody opens the tab.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from tensorboard.plugins import base_plugin

from ..errors import ArgumentError

if TYPE_CHECKING:
    from .served_runs import ServedRuns

Environment = dict[str, Any]
StartResponse = Callable[..., Any]
App = Callable[[Environment, StartResponse], Iterable[bytes]]

MOST_BUCKETS = 1 << 16
"""Buckets of an answer: many more than a screen has columns."""
RENDER = """
export function render() {
  const style = document.createElement("style");
  style.textContent = STYLE;
  document.head.append(style);
  document.documentElement.lang = "en";
  document.body.style.margin = "0";
  const root = document.createElement("div");
  document.body.append(root);
  window.gradclipPage = show(root, new ServedSource("./"));
  const { body } = window.parent.document;
  const followTheme = () => {
    const isDark = body.classList.contains("dark-mode");
    window.gradclipPage.setTheme(isDark);
    document.documentElement.style.colorScheme = isDark ? "dark" : "light"; // of the scroll bar
  };
  if (body !== document.body) {
    followTheme();
    new MutationObserver(followTheme).observe(body, { attributeFilter: ["class"] });
  }
}
"""
"""The function that TensorBoard calls in the frame of the tab."""


class GradientsPlugin(base_plugin.TBPlugin):  # type: ignore[misc]  # tensorboard has no annotations
    """The tab: the page's files, and the answers of its `ServedSource` (``page/source.js``).

    Args:
        context: What TensorBoard tells its plugins.
    """

    plugin_name = "gradients"

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._context = context
        self._runs: ServedRuns | None = None
        self._is_active = False

    def get_plugin_apps(self) -> dict[str, App]:
        """Return what is served, by path."""
        answers = ("runs", "overview", "series", "scalar", "parameters")
        return {
            "/page.js": self._script,
            **{f"/{name}": partial(self._answer, name) for name in answers},
        }

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Return the name of the tab and its module; the page looks for new steps by itself."""
        return base_plugin.FrontendMetadata(
            es_module_path="/page.js", tab_name="Gradients", disable_reload=True
        )

    def is_active(self) -> bool:
        """Return whether TensorBoard shows the tab: whether it knows of a run with norms."""
        if not self._is_active and self._context.data_provider is not None:
            from .provided_runs import has_norms

            self._is_active = has_norms(self._context.data_provider)
        return self._is_active

    def _script(self, environment: Environment, start: StartResponse) -> Iterable[bytes]:
        from .assets import script, style

        # The style sheet is in the module: the page reads its colours when it begins.
        parts = (script(), f"const STYLE = {json.dumps(style())};", RENDER)
        return _respond(environment, start, "\n".join(parts).encode(), "text/javascript")

    def _answer(self, name: str, environment: Environment, start: StartResponse) -> Iterable[bytes]:
        """Answer a question of the page; if it cannot be answered, with a sentence."""
        from werkzeug.wrappers import Request

        question = {**Request(environment).args}
        code = 200
        try:
            answer = self._answer_of(name, question, environment)
        except ArgumentError as error:
            answer, code = {"error": str(error)}, 400
        except Exception as error:  # noqa: BLE001  # the page shows it
            answer = {"error": f"The runs cannot be read: {type(error).__name__}: {error}."}
            code = 500
        content = json.dumps(answer, allow_nan=False).encode()
        return _respond(environment, start, content, "application/json", code)

    def _answer_of(
        self, name: str, question: Mapping[str, str], environment: Environment
    ) -> dict[str, Any]:
        from .run_view import FORMAT

        if self._runs is None:
            from .served_runs import runs_of

            self._runs = runs_of(self._context)
        if name == "runs":
            views, notes = self._runs.refreshed(environment)
            listed = [{"id": key, **view.listed} for key, view in views.items()]
            answer = {"format": FORMAT, "runs": listed, "notes": notes}
            return {**answer, "reading": self._runs.is_reading}
        key = question.get("run", "")
        view = self._runs.views.get(key)
        if view is None:
            raise ArgumentError(f"{key} is no longer there.")
        if name == "overview":
            return view.overview
        first, last = (_number_in(question, bound) for bound in ("first", "last"))
        buckets = min(_count_in(question, "buckets"), MOST_BUCKETS)
        if name == "series":
            return view.series(first, last, buckets)
        if name == "scalar":
            return view.scalar(question.get("tag", ""), first, last, buckets)
        quantity, search = question.get("quantity", ""), question.get("search", "")
        most = _count_in(question, "most")
        return view.parameters(quantity, first, last, buckets, search, most)


def _number_in(question: Mapping[str, str], name: str) -> float:
    """Return a number of a question.

    Raises:
        ArgumentError: It is missing or none.
    """
    with suppress(KeyError, ValueError):
        number = float(question[name])
        if not math.isnan(number):
            return number
    raise ArgumentError(f"{name} is {question.get(name)!r}: ask with a number.")


def _count_in(question: Mapping[str, str], name: str) -> int:
    """Return a whole number of a question; see `_number_in`."""
    number = _number_in(question, name)
    if math.isinf(number):
        raise ArgumentError(f"{name} is {question[name]!r}: ask with a finite number.")
    return int(number)


def _respond(
    environment: Environment, start: StartResponse, content: bytes, kind: str, code: int = 200
) -> Iterable[bytes]:
    from tensorboard.backend import http_util
    from werkzeug.wrappers import Request

    response = http_util.Respond(Request(environment), content, kind, code=code)
    return response(environment, start)  # type: ignore[no-any-return]
