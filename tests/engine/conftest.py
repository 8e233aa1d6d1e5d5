"""Real servers on loopback, and an MLflow database whose schema is made once."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from diptych.engine import reach
from diptych.engine.mlflow_events import make_client
from diptych.engine.outbox import Outbox
from diptych.engine.tracking import Target, Tracker


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def free_port():
    return _free_port


@pytest.fixture(scope="session")
def empty_db(tmp_path_factory):
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    make_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def project(tmp_path, empty_db, monkeypatch):
    """A project folder with an empty MLflow database."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_db, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def tracker_of():
    """Makes trackers, and gives their journals up at the end as a driver's death would."""
    made = []

    def make(root, uri=None, experiment="diptych"):
        made.append(Tracker(Target.local(root, experiment, uri), Outbox(root / "runs" / ".outbox")))
        return made[-1]

    yield make
    for tracker in made:
        with suppress(ValueError):
            die(tracker)


def die(tracker):
    """What the operating system does for a killed driver: its lock goes, its files stay."""
    if tracker._journal:
        tracker._journal._file.close()
        tracker._journal = None


@pytest.fixture
def kill():
    return die


class MlflowServer:
    """A real `mlflow server`, in a process group of its own."""

    def __init__(self, folder, backend, port):
        self.uri = f"http://127.0.0.1:{port}"
        self.command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        self.command += ["--backend-store-uri", backend, "--artifacts-destination", str(folder / "artifacts")]
        self.log = folder / "server.log"
        self.process = None

    def start(self, **environment):
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, **quiet, **environment}
            )
        deadline = time.monotonic() + 90
        while reach.listening(self.uri, 1):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.1)
        return self

    def kill(self):
        if self.process:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            while not reach.listening(self.uri, 1):
                time.sleep(0.05)


@pytest.fixture
def mlflow_server(project, free_port):
    made = []

    def start(backend=None, **environment):
        made.append(MlflowServer(project, backend or f"sqlite:///{project / 'mlflow.db'}", free_port()).start(**environment))
        return made[-1]

    yield start
    for server in made:
        server.kill()


class RayCluster:
    """A real `ray start --head` with its dashboard, in a temporary folder and on ports of its own."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="dr"))  # a short name: Ray's sockets lie below it
        self.address = f"http://127.0.0.1:{self._start()}"

    def _start(self):
        options = ["port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port", "ray-client-server-port", "runtime-env-agent-port", "node-manager-port", "object-manager-port"]  # fmt: skip
        ports = {option: _free_port() for option in options}
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2", "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1"]  # fmt: skip
        command += [f"--temp-dir={self.folder}", "--object-store-memory=100000000", "--include-dashboard=true", *(f"--{option}={port}" for option, port in ports.items())]  # fmt: skip
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        quiet = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "PATH": path}
        with (self.folder / "start.log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **quiet}, start_new_session=True)
        deadline = time.monotonic() + 120
        while not self._up(f"http://127.0.0.1:{ports['dashboard-port']}"):
            assert self.process.poll() is None, (self.folder / "start.log").read_text()[-3000:]
            assert time.monotonic() < deadline, (self.folder / "start.log").read_text()[-3000:]
            time.sleep(0.3)
        return ports["dashboard-port"]

    @staticmethod
    def _up(address):
        try:
            urllib.request.urlopen(f"{address}/api/jobs/", timeout=5).close()
        except OSError:
            return False
        return True

    def stop(self):
        """Ends what this object started, found by descent and by its folder, and nothing else."""
        ours = {self.process.pid, *(child.pid for child in psutil.Process(self.process.pid).children(recursive=True))}
        for process in psutil.process_iter(["cmdline"]):
            if str(self.folder) in " ".join(process.info["cmdline"] or []):
                ours.add(process.pid)
        for pid in ours:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster():
    started = RayCluster()
    yield started
    started.stop()
