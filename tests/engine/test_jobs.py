import contextlib
import http.server
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from diptych.core.errors import ConfigError, ResourceError
from diptych.engine import doctor, jobs, remote

PROGRAM = """
import argparse, pathlib, sys, time
import tinymod
parser = argparse.ArgumentParser()
parser.add_argument("--home", type=pathlib.Path); parser.add_argument("--tracking-uri")
parser.add_argument("workflow"); parser.add_argument("overrides", nargs="*")
options = parser.parse_args()
values = dict(item.split("=") for item in options.overrides)
options.home.mkdir(parents=True, exist_ok=True)
count = options.home / f"{values['name']}.count"
before = int(count.read_text()) if count.exists() else 0
count.write_text(str(before + 1))
print(f"{tinymod.GREETING} after {before} runs, to {options.tracking_uri}")
print("files:", *sorted(str(path) for path in pathlib.Path(".").rglob("*") if path.is_file() and "__pycache__" not in path.parts))
deadline = time.monotonic() + float(values.get("seconds", 0))
go = options.home / "go"
while time.monotonic() < deadline and not go.exists():
    time.sleep(0.1)
print("the end")
sys.exit(int(values.get("exit", 0)))
"""


@pytest.fixture
def tiny(tmp_path):
    """A project in git: code below platform/, a tracked file that git ignores, one that git does not know."""
    root = tmp_path / "tiny"
    (root / "platform" / "tinymod").mkdir(parents=True)
    (root / "platform" / "tinymod" / "__init__.py").write_text("GREETING = 'hello'\n")
    (root / "job.py").write_text(PROGRAM)
    (root / ".gitignore").write_text("ignored.txt\n")
    (root / "ignored.txt").write_text("tracked all the same")
    (root / "w.yaml").write_text("name: w\n")
    git = ["git", "-C", str(root)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "-f", "."], check=True)
    (root / "forgotten.py").write_text("")
    return root


def job_of(tmp_path, name, **values):
    overrides = tuple(f"{key}={value}" for key, value in {"name": name, **values}.items())
    return jobs.Job(name, "w.yaml", overrides, str(tmp_path / "home"), "sqlite:////x.db", ("python", "job.py"))


# ---------------------------------------------------------------- the pack


def test_the_pack_is_what_git_lists_as_it_is_now(tiny):
    (tiny / "job.py").write_text("changed")
    (tiny / "w.yaml").unlink()
    pack = jobs.pack(tiny)
    assert dict(pack.files)["job.py"] == len("changed")
    assert [name for name, _ in pack.files] == [".gitignore", "ignored.txt", "job.py", "platform/tinymod/__init__.py"]
    assert pack.untracked == ("forgotten.py",)


def test_the_pack_is_described_with_its_largest_files_and_what_stays(tiny):
    (tiny / "ignored.txt").write_bytes(b"x" * 300_000)
    text = jobs.describe(jobs.pack(tiny))
    assert text.startswith("5 files, 0.3 MiB")
    assert "293 KiB  ignored.txt" in text.splitlines()[1]
    assert "forgotten.py" in text


def test_a_pack_that_is_too_large_is_refused_with_the_culprits(tiny, monkeypatch):
    monkeypatch.setattr(jobs, "MAX_PACK_BYTES", 1 << 20)
    (tiny / "ignored.txt").write_bytes(b"x" * (2 << 20))
    with pytest.raises(ConfigError, match=r"ignored\.txt 2\.0 MiB"):
        jobs.pack(tiny)


def test_a_folder_without_git_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="git cannot list"):
        jobs.pack(tmp_path)


def test_the_entrypoint_survives_the_shell():
    job = jobs.Job("w-1", "workflows/my w.yaml", ("a.b=[x, $HOME]",), "/shared/my project", "http://mlflow:5000")
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {jobs.entrypoint(job)}"], capture_output=True, text=True, check=True).stdout
    assert words.splitlines() == [
        "python", "-m", "diptych.engine.remote", "--home", "/shared/my project", "--tracking-uri", "http://mlflow:5000", "workflows/my w.yaml", "a.b=[x, $HOME]",
    ]  # fmt: skip


def test_neither_secrets_nor_addresses_of_this_machine_travel(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:secret@store:9000")
    assert set(jobs.environment()) == {"PYTHONPATH", "PYTHONUNBUFFERED", "RAY_ENABLE_UV_RUN_RUNTIME_ENV"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    assert jobs.environment()["MLFLOW_TRACKING_URI"] == "https://mlflow.example.org"


# ---------------------------------------------------------------- a cluster that is not there


def test_no_cluster_is_said_quickly(free_port):
    started = time.monotonic()
    with pytest.raises(ResourceError, match="The cluster does not answer"):
        jobs.client(f"http://127.0.0.1:{free_port()}")
    assert time.monotonic() - started < 3


def test_a_client_address_is_not_a_dashboard():
    with pytest.raises(ConfigError, match="for `diptych run`"):
        jobs.client("ray://head:10001")


def test_a_silent_port_is_no_cluster(monkeypatch):
    monkeypatch.setattr(jobs, "ANSWER_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ResourceError, match="no answer within"):
        jobs.client(f"http://127.0.0.1:{silent.getsockname()[1]}")


@contextlib.contextmanager
def answering(status):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"Unauthorized: Missing authentication token")

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_closed_cluster_names_the_token():
    with answering(401) as address, pytest.raises(ResourceError, match="RAY_AUTH_MODE=token"):
        jobs.client(address)


def test_some_other_server_is_no_cluster():
    with answering(404) as address, pytest.raises(ResourceError, match="The cluster does not answer"):
        jobs.client(address)


# ---------------------------------------------------------------- a real one


@pytest.mark.server
@pytest.mark.ray
def test_a_job_runs_with_what_git_lists_and_its_log_is_shown(cluster, tiny, tmp_path, capsys):
    assert jobs.submit(job_of(tmp_path, "first"), jobs.pack(tiny), cluster.address, follow=True) == 0
    out = capsys.readouterr().out
    assert "submitted first-1" in out
    assert "hello after 0 runs, to sqlite:////x.db" in out
    assert "files: .gitignore ignored.txt job.py platform/tinymod/__init__.py w.yaml\n" in out
    assert out.count("the end") == 1
    assert "first-1: succeeded" in out


@pytest.mark.server
@pytest.mark.ray
def test_the_exit_code_of_the_run_comes_back(cluster, tiny, tmp_path):
    assert jobs.submit(job_of(tmp_path, "code", exit=3), jobs.pack(tiny), cluster.address, follow=True) == 3


@pytest.mark.server
@pytest.mark.ray
def test_a_second_submission_joins_and_a_third_continues(cluster, tiny, tmp_path, capsys):
    job, pack = job_of(tmp_path, "again", seconds=60), jobs.pack(tiny)
    assert jobs.submit(job, pack, cluster.address, follow=False) == 0
    threading.Timer(2, (tmp_path / "home" / "go").touch).start()
    assert jobs.submit(job, pack, cluster.address, follow=True) == 0
    out = capsys.readouterr().out
    assert "submitted again-1" in out
    assert "joined again-1" in out
    assert "hello after 0 runs" in out
    assert jobs.submit(job, pack, cluster.address, follow=True) == 0
    out = capsys.readouterr().out
    assert "submitted again-2" in out
    assert "hello after 1 runs" in out


class Terminal(io.StringIO):
    def isatty(self):
        return True


@contextlib.contextmanager
def interrupted_when(condition):
    """Ctrl-C in the main thread as soon as a condition holds."""

    def watch():
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    thread.join()


@pytest.mark.server
@pytest.mark.ray
def test_ctrl_c_asks_then_leaves_or_stops(cluster, tiny, tmp_path, monkeypatch):
    job, pack = job_of(tmp_path, "asked", seconds=300), jobs.pack(tiny)
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    for typed, code in (("n\n", 0), ("y\n", 130)):
        shown.truncate(0)
        monkeypatch.setattr(sys, "stdin", Terminal(typed))
        with interrupted_when(lambda: "files:" in shown.getvalue()):  # the log is seen while the job still runs
            assert jobs.submit(job, pack, cluster.address, follow=True) == code
        assert "asked-1 still runs. Stop it?" in shown.getvalue()
    assert "joined asked-1" in shown.getvalue()
    assert "asked-1: stopped" in shown.getvalue()
    assert shown.getvalue().count("files:") == 1
    assert (tmp_path / "home" / "asked.count").read_text() == "1"


@pytest.mark.server
@pytest.mark.ray
def test_without_a_terminal_ctrl_c_leaves_the_job(cluster, tiny, tmp_path, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with interrupted_when(lambda: "files:" in shown.getvalue()):
        assert jobs.submit(job_of(tmp_path, "left", seconds=20), jobs.pack(tiny), cluster.address, follow=True) == 0
    assert "left left-1 running" in shown.getvalue()
    assert jobs.client(cluster.address).get_job_status("left-1") == "RUNNING"


@pytest.mark.server
@pytest.mark.ray
def test_the_packed_project_runs_by_its_own_code(cluster, tmp_path, capsys):
    """All the way: the pack of this repository, its folder on the cluster, its command line; a mistake there is the job's exit code."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a git work tree")
    job = jobs.Job("real", "workflows/quickstart.yaml", ("train.nonsense=1",), str(tmp_path / "home"), None)
    assert jobs.submit(job, jobs.pack(root), cluster.address, follow=True) == ConfigError.exit_code
    assert "train.nonsense" in capsys.readouterr().out
    assert (tmp_path / "home" / "workflows" / "quickstart.yaml").exists()


@pytest.mark.server
@pytest.mark.ray
def test_the_doctor_sees_the_cluster(cluster):
    import ray

    check = doctor._cluster(cluster.address)
    assert check.state == "ok"
    assert f"Ray {ray.__version__}, " in check.text


def test_a_log_that_breaks_off_goes_on_without_repetition(capsys):
    import asyncio

    class Jobs:
        tails = 0

        async def tail_job_logs(self, name):
            self.tails += 1
            for text in (["one\n", "tw"], ["one\ntwo\n", "three\n"])[self.tails - 1]:
                yield text

    log = jobs._Log(Jobs(), "j")
    asyncio.run(log.tail())
    asyncio.run(log.tail())
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


# ---------------------------------------------------------------- on the cluster


def project_files(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_folder_mirrors_the_pack_and_keeps_what_was_computed(tmp_path):
    pack, home = tmp_path / "pack", tmp_path / "home"
    project_files(
        pack, **{"platform__diptych__a.py": "new", "workflows__w.yaml": "w", "dvc.yaml": "d", ".dvc__config": "c", "README.md": "r"}
    )
    project_files(home, **{"platform__diptych__deleted.py": "old", "platform__diptych__a.py": "old", "runs__w__out": "kept"})
    remote.prepare(pack, home)
    found = {path.relative_to(home).as_posix(): path.read_text() for path in home.rglob("*") if path.is_file()}
    assert found.pop(".dvc/config.local").split() == ["[core]", "no_scm", "=", "true"]
    assert found == {"platform/diptych/a.py": "new", "workflows/w.yaml": "w", "dvc.yaml": "d", ".dvc/config": "c", "runs/w/out": "kept"}


def test_somebodys_clone_is_left_as_it_is(tmp_path):
    pack, home = tmp_path / "pack", tmp_path / "home"
    project_files(pack, **{"dvc.yaml": "new"})
    project_files(home, **{"dvc.yaml": "mine", ".git__HEAD": ""})
    remote.prepare(pack, home)
    assert (home / "dvc.yaml").read_text() == "mine"
    assert not (home / ".dvc").exists()


def test_the_job_becomes_the_run(tmp_path, monkeypatch):
    became = []
    monkeypatch.setattr(os, "execv", lambda program, words: became.append((program, words)))
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    remote.main(["--home", str(home), "--tracking-uri", "http://mlflow:5000", "workflows/w.yaml", "train.epochs=5"])
    run = [sys.executable, "-m", "diptych.cli.main", "run", str(home / "workflows/w.yaml"), "train.epochs=5", "--address", "auto", "--tracking-uri", "http://mlflow:5000"]  # fmt: skip
    assert became == [(sys.executable, run)]


def test_a_second_job_in_the_folder_waits_for_the_first(tmp_path):
    code = f"import os, sys; from pathlib import Path; from diptych.engine import remote; remote.lock(Path({str(tmp_path)!r})); print('mine', flush=True); sys.stdin.read()"
    first, second = (
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    )
    lines = {process: process.stdout.readline() for process in (first, second)}
    holder = next(process for process in lines if lines[process] == "mine\n")
    waiter = second if holder is first else first
    assert lines[waiter] == f"another job works in {tmp_path}; waiting for it to end\n"
    holder.kill()
    assert waiter.stdout.readline() == "mine\n"
    waiter.kill()
    for process in (first, second):
        process.communicate()


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert remote.main(["--home", str(tmp_path / "file" / "home"), "w.yaml"]) == ResourceError.exit_code
    assert "cannot be written" in capsys.readouterr().err


def test_the_pack_of_this_repository_travels():
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a git work tree")
    names = dict(jobs.pack(root).files)
    assert {"dvc.yaml", "platform/diptych/engine/remote.py", "workflows/quickstart.yaml"} <= set(names)
