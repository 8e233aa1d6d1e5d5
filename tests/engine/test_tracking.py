import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diptych.core.errors import ResourceError
from diptych.engine import mlflow_events, system
from diptych.engine.mlflow_events import make_client
from diptych.engine.outbox import Journal, Outbox
from diptych.engine.tracking import MAX_POINTS, Target, flatten, newest_first

DAY_MS = 86_400_000


def record(tracker, files, name="run", pause=lambda: None):
    """A whole run as the workflow floor records it; `pause` is called in the middle."""
    parent = tracker.start(name, tags={"workflow": name, "note": "naïve 😀"})
    tracker.params(parent, {"seed": 0, "prune": [{"method": "semantic-dedup", "epsilon": 0.03}], "train": {"lr": 1e-3}})
    child = tracker.start(f"{name}/train", parent=parent, tags={"phase": "train"})
    tracker.dataset(child, "pairs", "sha256:" + "a" * 64, "file:///pairs", "train", {"num_rows": 10})
    records = [{"step": step, "time_ms": 1_700_000_000_000 + step, "loss": 1 / (1 + step)} for step in range(40)]
    tracker.series(child, records[:20], {"loss": "train/loss"})
    pause()
    tracker.series(child, records[20:], {"loss": "train/loss"})
    tracker.metrics(child, {"time/train_s": 3.5})
    tracker.end(child)
    tracker.metrics(parent, {"eval/emoji/zero-shot/acc1": 0.25, "data/prune/kept": 9})
    tracker.artifact(parent, files / "report.html")
    tracker.artifact(parent, files / "plots", "plots")
    tracker.note(parent, "| a | b |\n|---|---|\n| 1 | 2 |")
    tracker.end(parent)
    return parent


def contents(uri, experiment="diptych"):
    """Everything that MLflow knows of an experiment's runs, without its ids and clock times."""
    client = make_client(uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id], max_results=1000)
    names = {run.info.run_id: run.info.run_name for run in found}
    return sorted((_run(client, run, names) for run in found), key=lambda run: run["name"])


def _run(client, run, names):
    tags = dict(run.data.tags)
    tags.pop("mlflow.diptych.id")
    tags["mlflow.parentRunId"] = names.get(tags.get("mlflow.parentRunId"))
    for volatile in ("mlflow.user", "mlflow.log-model.history"):
        tags.pop(volatile, None)
    history = {key: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)) for key in run.data.metrics}
    inputs = [(entry.dataset.name, entry.dataset.digest, entry.dataset.profile, entry.tags[0].value) for entry in run.inputs.dataset_inputs]
    name, status = run.info.run_name, run.info.status
    return {"name": name, "status": status, "params": run.data.params, "tags": tags, "history": history, "inputs": inputs, "files": _files(client, run)}  # fmt: skip


def _files(client, run, folder=None):
    found = []
    for entry in client.list_artifacts(run.info.run_id, folder):
        found += _files(client, run, entry.path) if entry.is_dir else [(entry.path, entry.file_size)]
    return sorted(found)


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    (folder / "plots").mkdir(parents=True)
    (folder / "report.html").write_text("<h1>report</h1>")
    (folder / "plots" / "loss.svg").write_text("<svg/>")
    return folder


# ---------------------------------------------------------------- where, and under which names


def test_the_default_is_a_database_in_the_project(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert Target.local(tmp_path, "e") == Target(f"sqlite:///{tmp_path}/mlflow.db", "e", f"file://{tmp_path}/mlruns")


def test_a_relative_database_becomes_absolute_with_its_artifacts_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = Target.local(Path("/elsewhere"), "e", "sqlite:///results/x.db")
    assert target == Target(f"sqlite:///{tmp_path}/results/x.db", "e", f"file://{tmp_path}/results/mlruns")


def test_a_server_decides_on_its_artifacts(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000/")
    assert Target.local(tmp_path, "e") == Target("http://server:5000", "e", None)
    assert Target.local(tmp_path, "e", "postgresql://me:secret@host/db").shown == "postgresql://me:***@host/db"


def test_parameters_are_flattened_and_twins_kept_apart():
    methods = [{"method": "x", "e": 1}, {"method": "x", "e": 2}, {"method": "y"}, {"method": "x", "e": {"f": 3}}]
    assert flatten({"a": {"b": [1, 2], "none": []}, "m": methods, "n": [{"k": 2}]}) == {
        "a.b": [1, 2], "a.none": [], "m": "x, x-2, y, x-3", "m.x.e": 1, "m.x-2.e": 2, "m.x-3.e.f": 3, "n": "0", "n.0.k": 2,
    }  # fmt: skip


def test_parameters_look_as_in_the_workflow_file(project, tracker_of):
    tracker = tracker_of(project)
    tracker.params(tracker.start("r"), {"s": "text", "f": 1e-3, "b": True, "n": None, "l": ["noto", "naïve"]})
    (event,) = [event for _, event in tracker._journal.waiting() if event["kind"] == "params"]
    assert event["values"] == {"s": "text", "f": "0.001", "b": "true", "n": "null", "l": '["noto", "naïve"]'}


def test_long_curves_are_thinned_and_keep_both_ends(project, tracker_of):
    tracker = tracker_of(project)
    run = tracker.start("r")
    tracker.series(run, [{"step": step, "time_ms": step, "loss": step} for step in range(12_345)], {"loss": "train/loss", "absent": "x"})
    events = [event for _, event in tracker._journal.waiting() if event["kind"] == "metrics"]
    steps = [point[3] for event in events for point in event["points"]]
    assert steps[0] == 0
    assert steps[-1] == 12_344
    assert len(steps) <= MAX_POINTS + 1
    assert all(len(event["points"]) <= 1000 for event in events)


# ---------------------------------------------------------------- a database


def test_everything_arrives(project, files, tracker_of):
    tracker = tracker_of(project)
    tracker.check()
    parent = record(tracker, files)
    assert tracker.close() == 0
    assert tracker.trouble == ""
    assert list((project / "runs" / ".outbox").iterdir()) == []
    run, train = contents(tracker.target.uri)
    assert run["name"] == "run"
    assert run["status"] == train["status"] == "FINISHED"
    assert run["params"] == {"seed": "0", "prune": "semantic-dedup", "prune.semantic-dedup.epsilon": "0.03", "train.lr": "0.001"}
    assert run["history"] == {"eval/emoji/zero-shot/acc1": [(0, 0.25)], "data/prune/kept": [(0, 9.0)]}
    assert run["files"] == [("plots/loss.svg", 6), ("report.html", 15)]
    assert run["tags"]["mlflow.note.content"].startswith("| a |")
    assert run["tags"]["note"] == "naïve 😀"
    assert train["tags"]["mlflow.parentRunId"] == "run"
    assert train["history"]["train/loss"] == [(step, 1 / (1 + step)) for step in range(40)]
    assert train["inputs"] == [("pairs", "a" * 36, '{"num_rows": 10}', "train")]
    assert make_client(tracker.target.uri).get_run(tracker.run_id(parent)).info.run_name == "run"


def test_a_driver_killed_anywhere_leaves_no_duplicates(project, files, tracker_of, kill, monkeypatch):
    """Killed between sending an event and marking it, at every event in turn; the next driver completes the record."""
    whole = tracker_of(project, experiment="whole")
    record(whole, files)
    count = whole._journal.behind
    assert whole.close() == 0
    mark = Journal.mark
    for position in range(count):
        experiment = f"killed-{position}"
        driver = tracker_of(project, experiment=experiment)
        record(driver, files)

        def die_at(journal, offset, position=position):
            if journal.behind == count - position:
                raise OSError("killed")
            mark(journal, offset)

        monkeypatch.setattr(Journal, "mark", die_at)
        assert driver.flush() == count - position
        monkeypatch.setattr(Journal, "mark", mark)
        kill(driver)
        tracker_of(project, experiment="next").flush(force=True)
        assert contents(driver.target.uri, experiment) == contents(whole.target.uri, "whole"), position
    assert list((project / "runs" / ".outbox").iterdir()) == []


def test_a_killed_drivers_runs_are_completed_by_the_next_driver(project, files, tracker_of, kill):
    dead = tracker_of(project)
    parent = dead.start("dead")
    child = dead.start("dead/train", parent=parent)
    dead.metrics(child, {"train/loss": 1.0})
    dead.flush()
    dead.metrics(child, {"train/loss": 0.5}, step=1)
    kill(dead)
    living = tracker_of(project)
    living.start("living")
    assert living.flush(force=True) == 0
    found = {run["name"]: run for run in contents(living.target.uri)}
    assert {name: run["status"] for name, run in found.items()} == {"dead": "KILLED", "dead/train": "KILLED", "living": "RUNNING"}
    assert found["dead/train"]["history"]["train/loss"] == [(0, 1.0), (1, 0.5)]
    assert "later run" in found["dead"]["tags"]["diptych.ended"]
    assert "diptych.ended" not in found["living"]["tags"]


def test_two_drivers_of_one_project_and_a_third_of_another(project, tmp_path, tracker_of):
    other = tmp_path / "other"
    other.mkdir()
    uri = f"sqlite:///{project / 'mlflow.db'}"
    code = f"""
import sys
from pathlib import Path
from diptych.engine.outbox import Outbox
from diptych.engine.tracking import Target, Tracker
root, name = Path(sys.argv[1]), sys.argv[2]
tracker = Tracker(Target.local(root, "shared", {uri!r}), Outbox(root / "runs" / ".outbox"))
tracker.check()
parent = tracker.start(name)
for step in range(30):
    tracker.metrics(parent, {{"train/loss": float(step)}}, step)
    tracker.flush(force=step % 10 == 0)
tracker.end(parent)
sys.exit(tracker.close())
"""
    drivers = [
        subprocess.Popen([sys.executable, "-c", code, str(root), name]) for root, name in ((project, "a"), (project, "b"), (other, "c"))
    ]
    assert [driver.wait(120) for driver in drivers] == [0, 0, 0]
    assert [(run["name"], run["status"], len(run["history"]["train/loss"])) for run in contents(uri, "shared")] == [
        ("a", "FINISHED", 30), ("b", "FINISHED", 30), ("c", "FINISHED", 30),
    ]  # fmt: skip


def test_what_mlflow_refuses_for_good_does_not_hold_up_the_rest(project, tracker_of):
    tracker = tracker_of(project)
    run = tracker.start("r")
    tracker.params(run, {"lr": 1})
    tracker.params(run, {"lr": 2})  # a parameter cannot change
    tracker.metrics(run, {"eval/set/recall@5": 0.5, "bad": math.nan})
    tracker.end(run)
    assert tracker.close() == 0
    assert tracker.outbox.refused == 1
    assert "lr" in (tracker.outbox.folder / "refused").read_text()
    (found,) = contents(tracker.target.uri)
    assert found["params"] == {"lr": "1"}
    assert found["history"]["eval/set/recall-5"] == [(0, 0.5)]
    assert found["status"] == "FINISHED"


def test_a_file_that_is_gone_is_named_in_the_run(project, tmp_path, tracker_of):
    tracker = tracker_of(project)
    run = tracker.start("r")
    tracker.artifact(run, tmp_path / "gone.html")
    tracker.model(run, tmp_path / "gone-model", "m")
    assert tracker.close() == 0
    (found,) = contents(tracker.target.uri)
    assert {"diptych.missing.gone.html", "diptych.missing.gone-model"} <= set(found["tags"])


def test_a_deleted_experiment_is_refused_with_the_way_back(project, tracker_of):
    tracker = tracker_of(project)
    tracker.check()
    client = make_client(tracker.target.uri)
    client.delete_experiment(client.get_experiment_by_name("diptych").experiment_id)
    with pytest.raises(ResourceError, match="mlflow experiments restore"):
        tracker_of(project).check()


def test_newest_first(project, tracker_of):
    tracker = tracker_of(project)
    assert newest_first(tracker.target, "") == []
    for number in range(3):
        tracker.end(tracker.start("r", tags={"kind": "claim" if number else "arm", "number": str(number)}))
        time.sleep(0.01)
    tracker.close()
    assert [tags["number"] for tags in newest_first(tracker.target, "tags.kind = 'claim'")] == ["2", "1"]


def test_system_metrics_are_sampled_and_sent_while_the_run_lasts(project, tracker_of, monkeypatch):
    monkeypatch.setattr(system.Sampler.__init__, "__defaults__", (0.1,))
    tracker = tracker_of(project)
    run = tracker.start("r")
    tracker.watch_system(run)
    deadline = time.monotonic() + 30
    while tracker.run_id(run) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert tracker.run_id(run), "sent by the sampler, nobody called flush"
    time.sleep(0.5)
    assert tracker.close() == 0
    (found,) = contents(tracker.target.uri)
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(found["history"])
    assert len(found["history"]["system/system_memory_usage_percentage"]) > 1


def test_the_lines_of_nvidias_tool():
    text = "0, 87, 1024, 4096\n1, [N/A], 2048, [N/A]\nnonsense\n"
    assert system.parse_gpus(text) == {
        "system/gpu_0_utilization_percentage": 87.0,
        "system/gpu_0_memory_usage_megabytes": pytest.approx(1073.74, abs=0.01),
        "system/gpu_0_memory_usage_percentage": 25.0,
        "system/gpu_1_memory_usage_megabytes": pytest.approx(2147.48, abs=0.01),
    }


# ---------------------------------------------------------------- a server


def test_a_server_that_is_down_is_refused_at_once(tmp_path, tracker_of, free_port):
    started = time.monotonic()
    with pytest.raises(ResourceError) as caught:
        tracker_of(tmp_path, f"http://127.0.0.1:{free_port()}").check()
    assert "MLflow does not answer" in str(caught.value)
    assert "Connection refused" in str(caught.value)
    assert "start the server" in str(caught.value)
    assert time.monotonic() - started < 5
    assert not (tmp_path / "runs").exists()


def test_a_database_server_that_is_down_is_refused_at_once(tmp_path, tracker_of, free_port):
    started = time.monotonic()
    with pytest.raises(ResourceError, match="does not accept connections"):
        tracker_of(tmp_path, f"postgresql://me:secret@127.0.0.1:{free_port()}/mlflow").check()
    assert time.monotonic() - started < 5


def test_a_server_that_hangs_blocks_nobody_for_long(tmp_path, tracker_of, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0), backlog=16) as silent:  # accepts, never answers
        tracker = tracker_of(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ResourceError, match="MLflow does not answer"):
            tracker.check()
        tracker.start("r")
        started = time.monotonic()
        assert tracker.flush(force=True, patience_s=0.2) == 2
        assert time.monotonic() - started < 0.9
        assert tracker.close() == 2
        assert time.monotonic() - started < 10


@pytest.mark.server
def test_a_server_killed_in_the_middle_of_a_run_loses_nothing(project, files, tracker_of, mlflow_server, kill):
    undisturbed = tracker_of(project, experiment="undisturbed")
    record(undisturbed, files)
    assert undisturbed.close() == 0

    server = mlflow_server()
    tracker = tracker_of(project, server.uri)
    tracker.check()

    def outage():
        assert tracker.flush() == 0
        server.kill()
        tracker.metrics(tracker.start("seen only later"), {"train/loss": 1.0})
        started = time.monotonic()
        assert tracker.flush() == 2
        assert tracker.flush() == 2
        assert time.monotonic() - started < 5, "a dead server costs a run next to nothing"

    record(tracker, files, pause=outage)
    assert tracker.close() >= 10
    assert "does not accept connections" in tracker.trouble

    server.start()
    later = tracker_of(project, server.uri)
    later.check()
    assert later.flush(force=True) == 0
    assert later.outbox.behind == 0
    assert later.outbox.refused == 0
    found = contents(server.uri)
    extra = found.pop()
    assert (extra["name"], extra["status"], extra["history"]) == ("seen only later", "KILLED", {"train/loss": [(0, 1.0)]})
    assert found == contents(undisturbed.target.uri, "undisturbed")


@pytest.mark.server
def test_a_driver_killed_by_signal_is_completed_on_a_server(project, tracker_of, mlflow_server):
    server = mlflow_server()
    code = f"""
import os, signal, time
from pathlib import Path
from diptych.engine import outbox
from diptych.engine.tracking import Target, Tracker
tracker = Tracker(Target.local(Path({str(project)!r}), "diptych", {server.uri!r}), outbox.Outbox(Path({str(project / "runs" / ".outbox")!r})))
tracker.check()
run = tracker.start("r")
tracker.metrics(run, {{"train/loss": 1.0}})
tracker.dataset(run, "pairs", "sha256:abc", "file:///pairs", "train")
mark = outbox.Journal.mark
outbox.Journal.mark = lambda journal, offset: mark(journal, offset) if journal.behind > 2 else os.kill(os.getpid(), signal.SIGKILL)
tracker.flush(force=True)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120, env={**os.environ}).returncode == -signal.SIGKILL
    tracker = tracker_of(project, server.uri)
    assert tracker.flush(force=True) == 0
    (run,) = contents(server.uri)
    assert run["status"] == "KILLED"
    assert run["history"] == {"train/loss": [(0, 1.0)]}
    assert len(run["inputs"]) == 1
    assert Outbox(project / "runs" / ".outbox").behind == 0


def test_refusals_are_told_from_failures():
    from mlflow.exceptions import MlflowException

    assert mlflow_events.refused(MlflowException("x", error_code=1000))
    assert mlflow_events.refused(KeyError("run"))
    assert not mlflow_events.refused(MlflowException("x"))
    assert not mlflow_events.refused(ConnectionError("x"))
