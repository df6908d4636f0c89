"""The plugin of TensorBoard without a server: what it reads, what it answers, what it imports."""

import json
import math
import subprocess
import sys
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from torch.utils.tensorboard import SummaryWriter
from werkzeug.test import Client

from gradclip.report.event_files import EventStream
from gradclip.report.tags import TaggedRuns
from gradclip.view import local_runs
from gradclip.view.local_runs import run_directories
from gradclip.view.plugin import GradientsPlugin
from gradclip.view.served_runs import folders_of
from tests.support.curves import curves_in, framed, log_run
from tests.support.packed import unpacked


class Tab:
    """The routes of a plugin, asked as a browser would."""

    def __init__(self, **context):
        self.plugin = GradientsPlugin(TBContext(**context))
        self.apps = self.plugin.get_plugin_apps()

    def ask(self, path, code=200, **question):
        response = Client(self.apps[path]).get(path, query_string=question)
        assert response.status_code == code
        return response

    def answer(self, path, code=200, **question):
        return json.loads(self.ask(path, code, **question).data)


def tab_on(folder, spec=""):
    return Tab(flags=SimpleNamespace(logdir=str(folder), logdir_spec=spec), logdir=str(folder))


def tab_of_provider(folder):
    """Return the tab of a TensorBoard that knows no folder, only its data provider."""
    multiplexer = EventMultiplexer(tensor_size_guidance={"scalars": 1000})
    multiplexer.AddRunsFromDirectory(str(folder)).Reload()
    return Tab(data_provider=MultiplexerDataProvider(multiplexer, ""))


def runs_listed(tab):
    """Return the runs and the notes once all is read."""
    while (answer := tab.answer("/runs"))["reading"]:
        assert answer["notes"]
    assert answer["format"] == 1
    return {run["id"]: run for run in answer["runs"]}, answer["notes"]


RANGE = {"first": "-Infinity", "last": "Infinity", "buckets": 100_000}


@pytest.mark.parametrize("make", [tab_on, tab_of_provider])
def test_curves(tmp_path, make):
    """Of files every point; of a provider the sample that it keeps, which is said."""
    log_run(tmp_path / "a", *map(float, range(1, 1501)), max_norm=700.0)
    is_sample = make is tab_of_provider
    tab = make(tmp_path)
    runs, notes = runs_listed(tab)
    assert notes == []
    count = 1000 if is_sample else 1500
    assert runs == {
        "a": {
            "id": "a",
            "name": "a",
            "steps": count,
            "first": runs["a"]["first"],
            "last": 1499,
            "sampled": is_sample,
            "observed": False,
        }
    }
    assert tab.answer("/overview", run="a")["summary"]["steps"] == count
    series = tab.answer("/series", run="a", **RANGE)
    assert series["size"] == 1
    steps = unpacked(series["steps"])
    assert len(steps) == count
    for name, tag in (("norm", "pre"), ("clipped_norm", "post")):
        values = {
            point.step: point.value for point in curves_in(tmp_path / "a")[f"grad_norm/{tag}"]
        }
        assert unpacked(series["columns"][name]["low"]).tolist() == [values[s] for s in steps]


def test_is_active_once_there_is_a_norm(tmp_path):
    with SummaryWriter(str(tmp_path / "other")) as writer:
        writer.add_scalar("accuracy", 0.5, 0)
    assert not tab_of_provider(tmp_path).plugin.is_active()
    assert not Tab().plugin.is_active()
    with SummaryWriter(str(tmp_path / "trainer")) as writer:
        writer.add_scalar("train/grad_norm", 0.5, 0)
    assert tab_of_provider(tmp_path).plugin.is_active()


def test_without_a_run_there_is_a_sentence(tmp_path):
    assert runs_listed(tab_of_provider(tmp_path)) == (
        {},
        ["TensorBoard knows of no run with gradient norms."],
    )
    assert runs_listed(Tab()) == (
        {},
        ["This TensorBoard has neither local event files nor a data provider."],
    )
    _, [note] = runs_listed(tab_on(tmp_path / "missing"))
    assert note.startswith(f"There are no event files in {tmp_path / 'missing'}: give a")


@pytest.mark.parametrize(
    ("path", "question", "sentence"),
    [
        ("/overview", {"run": "b"}, "b is no longer there."),
        ("/series", {"run": "a"}, "first is None: ask with a number."),
        ("/series", {"run": "a", **RANGE, "last": "NaN"}, "last is 'NaN': ask with a number."),
        (
            "/series",
            {"run": "a", **RANGE, "buckets": "inf"},
            "buckets is 'inf': ask with a finite number.",
        ),
        ("/series", {"run": "a", **RANGE, "buckets": "0"}, "buckets is 0: ask for 1 or more."),
        ("/scalar", {"run": "a", "tag": "x", **RANGE}, "a has no scalar 'x': ask for one of []."),
        ("/parameters", {"run": "a", "most": 5, **RANGE}, "a has no '' of parameters: ask for"),
    ],
)
def test_questions_without_an_answer(tmp_path, path, question, sentence):
    log_run(tmp_path / "a", 1.0, 2.0)
    tab = tab_on(tmp_path)
    runs_listed(tab)
    assert tab.answer(path, 400, **question)["error"].startswith(sentence)


def test_an_error_of_the_provider_is_told(tmp_path):
    class Failing:
        def list_scalars(self, *_, **__):
            raise OSError("no bucket")

    answer = Tab(data_provider=Failing()).answer("/runs", 500)
    assert answer == {"error": "The runs cannot be read: OSError: no bucket."}


def test_the_module_of_the_tab(tmp_path):
    """TensorBoard imports it from the path that it is told, and calls render()."""
    tab = Tab()
    script = tab.ask(tab.plugin.frontend_metadata().es_module_path)
    assert script.mimetype == "text/javascript"
    assert "export function render()" in script.text
    assert not [line for line in script.text.split("\n") if line.startswith("import ")]


@pytest.mark.parametrize(
    ("logdir", "spec", "needed"),
    [
        ("/logs", "", [("", Path("/logs"))]),
        ("~/logs", "", [("", Path("~/logs").expanduser())]),
        ("", "a:/x,/y:z,b:rel/c:d,e", [("a", "/x"), ("", "/y:z"), ("b", "rel/c:d"), ("", "e")]),
        ("gs://bucket/logs", "", None),
        ("", "a:/x,s3://bucket/logs", None),
        ("", "a:s3://bucket/logs", None),
        ("", "", None),
    ],
)
def test_folders_are_those_of_the_options(logdir, spec, needed):
    """None where one of them is elsewhere."""
    found = folders_of(logdir, spec)
    assert found == (needed and [(name, Path(folder)) for name, folder in needed])


def test_links_that_lead_back_are_followed_once(tmp_path):
    log_run(tmp_path / "real" / "a", 1.0)
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "a" / "up").symlink_to(logs)
    assert [name for _, name in run_directories([("", logs)])] == ["linked/a"]
    assert [name for _, name in run_directories([("g", logs)])] == ["g/linked/a"]


def test_an_event_stream_goes_on_where_it_ended(tmp_path):
    """However the file grows; half an event waits for its rest."""
    log_run(tmp_path / "a", *map(float, range(20)))
    [file] = (tmp_path / "a").iterdir()
    content, growing = file.read_bytes(), tmp_path / "growing"
    needed = [event.SerializeToString() for event in EventStream(file)]
    stream, found = EventStream(growing), []
    for end in (0, 5, 11, 12, 13, 100, 101, 1000, len(content) - 1, len(content)):
        growing.write_bytes(content[:end])
        found += [event.SerializeToString() for event in stream]
        assert stream.trouble is None
        assert not stream.was_replaced()
    assert found == needed
    assert stream.offset == stream.size == len(content)
    growing.write_bytes(content[:50])
    assert stream.was_replaced()
    growing.unlink()
    assert stream.was_replaced()


def test_an_event_stream_ends_at_damage(tmp_path):
    for trouble, rest in (
        ("it is cut short or damaged", b"\1" * 40),
        ("it holds records that are not events", framed([b"\xff\xff"])),
    ):
        log_run(tmp_path / "a", 1.0, 2.0)
        *_, file = sorted((tmp_path / "a").iterdir())
        count = len([*EventStream(file)])
        with file.open("ab") as stream:
            stream.write(rest + framed([b""]))
        stream = EventStream(file)
        assert len([*stream]) == count
        assert stream.trouble.startswith(trouble)
        assert [*stream] == []


@pytest.mark.parametrize("looks", [(), (1,), (1, 2, 3, 4, 5)])
def test_numbers_of_a_step_that_come_one_by_one_make_one_step(looks):
    """However often somebody looks between them."""
    runs = TaggedRuns("run")
    numbers = [("pre", 4.0, 0), ("post", 2.0, 0), ("skipped_steps", 1.0, 0)]
    numbers += [("pre", 3.0, 1), ("post", 1.0, 1), ("skipped_steps", 1.0, 1)]
    for index, (tag, number, step) in enumerate(numbers):
        runs.add(step, {f"grad_norm/{tag}": number})
        if index in looks:
            [run] = runs.runs()
            assert run.steps.tolist() == [*range(step + 1)]
    [run] = runs.runs()
    assert run.norms.tolist() == [4.0, 3.0]
    assert run.clipped_norms.tolist() == [2.0, 1.0]
    assert run.skipped.tolist() == [True, False]


def test_a_file_that_is_replaced_is_read_again(tmp_path):
    log_run(tmp_path / "a", 1.0, 2.0, 3.0)
    tab = tab_on(tmp_path)
    assert runs_listed(tab)[0]["a"]["steps"] == 3
    [file] = (tmp_path / "a").iterdir()
    file.unlink()
    log_run(tmp_path / "a", 5.0)
    assert runs_listed(tab)[0]["a"]["steps"] == 1
    assert unpacked(tab.answer("/series", run="a", **RANGE)["columns"]["norm"]["low"]) == [5.0]


def test_a_link_to_a_file_that_is_gone_is_named_and_hides_no_run(tmp_path):
    log_run(tmp_path / "a", 1.0, 2.0)
    (tmp_path / "a" / "a.tfevents.link").symlink_to(tmp_path / "gone")  # sorts before the file
    runs, notes = runs_listed(tab_on(tmp_path))
    assert runs["a"]["steps"] == 2
    [note] = notes
    assert note.startswith(f"{tmp_path / 'a'}: it cannot be read: ")
    assert "a.tfevents.link" in note


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_read(tmp_path):
    log_run(tmp_path / "a", 1.0, 2.0)
    (tmp_path / "a" / "events.out.tfevents.0.x").mkdir()  # sorts before the file
    runs, notes = runs_listed(tab_on(tmp_path))
    assert runs["a"]["steps"] == 2
    [note] = notes
    assert note.startswith(f"{tmp_path / 'a'}: it cannot be read: ")
    assert "events.out.tfevents.0.x" in note


def test_what_was_read_so_far_is_shown_while_the_rest_is_read(tmp_path, monkeypatch):
    log_run(tmp_path / "a", *map(float, range(50)))
    gate = Event()
    monkeypatch.setattr(local_runs, "EVENTS_AT_ONCE", 20)
    monkeypatch.setattr(local_runs, "time", SimpleNamespace(sleep=lambda _: gate.wait()))
    tab = tab_on(tmp_path)
    answer = tab.answer("/runs")
    assert answer["reading"]
    assert answer["notes"] == ["Event files are being read: 0 of 0 MiB so far."]
    assert 0 < answer["runs"][0]["steps"] <= 20
    gate.set()
    assert runs_listed(tab)[0]["a"]["steps"] == 50


LOOK = """
import sys
import tensorboard.default
tensorboard.default.get_plugins()
assert "gradclip.view.run_view" not in sys.modules
from types import SimpleNamespace
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client
from gradclip.view.plugin import GradientsPlugin
plugin = GradientsPlugin(TBContext(flags=SimpleNamespace(logdir=sys.argv[1], logdir_spec="")))
assert "gradclip.view.run_view" not in sys.modules
client = lambda path: Client(plugin.get_plugin_apps()[path]).get(path, query_string={"run": "a"})
while (answer := client("/runs").json)["reading"]:
    pass
assert len(answer["runs"]) == 1
assert client("/overview").json["summary"]["steps"] == 2
assert client("/page.js").status_code == 200
assert "torch" not in sys.modules
"""


def test_nothing_is_imported_before_somebody_looks_and_torch_never(tmp_path):
    log_run(tmp_path / "a", 1.0, 2.0)
    done = subprocess.run(
        [sys.executable, "-c", LOOK, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_norm_that_is_not_finite_is_no_number_in_json(tmp_path):
    log_run(tmp_path / "a", 1.0, math.nan, math.inf)
    tab = tab_on(tmp_path)
    assert runs_listed(tab)[0]["a"]["steps"] == 3
    series = tab.answer("/series", run="a", **RANGE)
    assert unpacked(series["counts"]["nonfinite"]).tolist() == [0, 1, 1]
    assert tab.answer("/overview", run="a")["summary"]["nonfinite_steps"] == 2
