import subprocess
import sys
import time

import pytest

from diptych.engine import doctor
from diptych.engine.doctor import Check


@pytest.fixture
def dvc_project(tmp_path):
    def make(remote=None):
        dvc = [sys.executable, "-m", "dvc"]
        subprocess.run([*dvc, "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
        if remote:
            subprocess.run([*dvc, "remote", "add", "-d", "store", remote, "-q"], cwd=tmp_path, check=True)
        (tmp_path / "dvc.yaml").write_text("stages:\n  a:\n    cmd: echo a\n")
        return tmp_path

    return make


def test_findings_as_text():
    text = doctor.text([Check("disk", "ok", "9 GiB"), Check("gpu", "note", "none"), Check("mlflow", "mend", "down", "start it")])
    assert text.splitlines() == [
        "  ok    disk           9 GiB",
        "  note  gpu            none",
        "  MEND  mlflow         down",
        "                       -> start it",
        "",
        "  1 thing to mend",
    ]
    assert doctor.text([Check("disk", "ok", "9 GiB")]).endswith("  ready")


def test_a_check_that_breaks_is_itself_a_finding(tmp_path, monkeypatch):
    for name in ("_ray", "_dvc", "_mlflow", "_gpu", "_byte_code"):
        monkeypatch.setattr(doctor, name, lambda *arguments: Check("quick", "ok", ""))
    monkeypatch.setattr(doctor, "_memory", lambda: 1 / 0)
    found = {check.name: check for check in doctor.examine(tmp_path, None, None)}
    assert found["memory"].state == "mend"
    assert "ZeroDivisionError" in found["memory"].text
    assert found["cores"].state in ("ok", "note")
    assert "disk" in found


def test_little_memory_and_a_full_disk_are_to_mend(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "MIN_MEMORY_BYTES", 1 << 60)
    monkeypatch.setattr(doctor, "MIN_DISK_BYTES", 1 << 60)
    memory, disk = doctor._memory(), doctor._disk(tmp_path)
    assert (memory.state, disk.state) == ("mend", "mend")
    assert "batch_size" in memory.fix
    assert str(tmp_path) in disk.text


def test_a_server_that_is_down_is_to_mend(tmp_path, free_port):
    check = doctor._mlflow(tmp_path, f"http://127.0.0.1:{free_port()}")
    assert check.state == "mend"
    assert "does not accept connections" in check.text
    assert "start the server" in check.fix


def test_the_database_is_made_by_the_first_run_not_by_the_doctor(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    check = doctor._mlflow(tmp_path, None)
    assert check.state == "ok"
    assert "will be made" in check.text
    assert list(tmp_path.iterdir()) == []


def test_what_waits_and_what_was_refused_is_told(project, tracker_of):
    assert doctor._mlflow(project, None).state == "ok"
    tracker = tracker_of(project)
    run = tracker.start("r")
    waiting = doctor._mlflow(project, None)
    assert waiting.state == "note"
    assert "2 events wait" in waiting.text
    tracker.params(run, {"a": 1})
    tracker.params(run, {"a": 2})
    tracker.close()
    refused = doctor._mlflow(project, None)
    assert refused.state == "note"
    assert "1 events were refused" in refused.text


def test_dvc_without_a_project_is_to_mend(tmp_path):
    check = doctor._dvc(tmp_path)
    assert check.state == "mend"
    assert "dvc init" in check.fix


def test_dvc_without_a_remote_says_so(dvc_project):
    check = doctor._dvc(dvc_project())
    assert check.state == "ok"
    assert "1 stages, no remote" in check.text


def test_a_remote_that_answers(dvc_project, tmp_path_factory):
    check = doctor._dvc(dvc_project(str(tmp_path_factory.mktemp("store"))))
    assert check.state == "ok"
    assert "remote 'store' answers" in check.text


def test_a_remote_that_cannot_be_reached_is_to_mend_in_time(dvc_project, monkeypatch):
    folder = dvc_project("/somewhere")
    monkeypatch.setattr(doctor, "_remote", lambda repo, name: time.sleep(30) or "")
    monkeypatch.setattr(doctor, "SERVICE_S", 0.2)
    check = doctor._dvc(folder)
    assert check.state == "mend"
    assert "no answer within" in check.text


def test_no_cluster_is_to_mend(free_port):
    check = doctor._cluster(f"http://127.0.0.1:{free_port()}")
    assert check.state == "mend"
    assert "does not accept connections" in check.text


@pytest.mark.ray
def test_ray_runs_a_task(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check = doctor._ray()
    assert check.state == "ok", check
    assert "a task ran" in check.text
