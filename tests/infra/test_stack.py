"""The services of compose.yaml as processes on loopback: PostgreSQL, an S3 store, and MLflow with compose's own command."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from diptych.engine import reach
from diptych.engine.mlflow_events import make_client
from diptych.engine.outbox import Outbox
from diptych.engine.tracking import Target, Tracker


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(uri, process, log):
    deadline = time.monotonic() + 90
    while reach.listening(uri, 1):
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


@pytest.fixture(scope="module")
def postgres(compose):
    """A PostgreSQL with the database, user and password of compose.yaml; gives its port."""
    tools = {
        name: shutil.which(name) or next(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), None)
        for name in ("initdb", "postgres")
    }
    if None in tools.values():
        pytest.skip("PostgreSQL's server is not installed")
    folder = Path(tempfile.mkdtemp(prefix="dpg"))
    user = pwd.getpwnam("nobody").pw_uid if os.getuid() == 0 else None  # PostgreSQL refuses to run as root
    if user is not None:
        os.chown(folder, user, -1)
    values = compose["services"]["postgres"]["environment"]
    (folder / "password").write_text(values["POSTGRES_PASSWORD"])
    port, log = free_port(), folder / "log"
    initdb = [tools["initdb"], "-D", str(folder / "data"), "-U", values["POSTGRES_USER"], "--pwfile", str(folder / "password"), "-A", "scram-sha-256", "--no-sync"]  # fmt: skip
    subprocess.run(initdb, check=True, capture_output=True, user=user, cwd=folder)
    server = [
        tools["postgres"],
        "-D",
        str(folder / "data"),
        "-p",
        str(port),
        "-k",
        str(folder),
        "-c",
        "listen_addresses=127.0.0.1",
        "-c",
        "fsync=off",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(server, stdout=output, stderr=output, user=user, cwd=folder)
    try:
        wait_for(f"http://127.0.0.1:{port}", process, log)
        _create_database(port, values)
        yield port
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _create_database(port, values):
    import psycopg2

    deadline = time.monotonic() + 30
    while True:
        try:
            connection = psycopg2.connect(host="127.0.0.1", port=port, user=values["POSTGRES_USER"], password=values["POSTGRES_PASSWORD"], dbname="postgres")  # fmt: skip
            break
        except psycopg2.OperationalError:  # it listens before it serves
            assert time.monotonic() < deadline
            time.sleep(0.1)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {values['POSTGRES_DB']}")
    connection.close()


@pytest.fixture(scope="module")
def store():
    """An S3 store with the bucket that compose.yaml makes; gives its client."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client(
        "s3", endpoint_url=f"http://{host}:{port}", aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1"
    )
    client.create_bucket(Bucket="mlflow")
    yield client
    server.stop()


@pytest.fixture(scope="module")
def mlflow_server(compose, postgres, store, tmp_path_factory):
    """`mlflow server` with the command and environment of compose.yaml, on this machine's addresses; gives its URI."""
    service, port, folder = compose["services"]["mlflow"], free_port(), tmp_path_factory.mktemp("mlflow")
    here = {"0.0.0.0": "127.0.0.1", "5000": str(port)}
    command = [here.get(word, word).replace(":5000", f":{port}") for word in service["command"]]
    environment = dict(service["environment"])
    environment["MLFLOW_BACKEND_STORE_URI"] = environment["MLFLOW_BACKEND_STORE_URI"].replace("postgres:5432", f"127.0.0.1:{postgres}")
    environment["AWS_ENDPOINT_URL"] = store.meta.endpoint_url
    bin_folder = Path(sys.executable).parent
    environment |= {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=folder, env={**os.environ, **environment}, start_new_session=True
        )
    uri = f"http://127.0.0.1:{port}"
    try:
        wait_for(uri, process, log)
        yield uri
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.server
def test_a_run_through_the_whole_stack(mlflow_server, postgres, store, compose, tmp_path, tmp_path_factory):
    import psycopg2

    report = tmp_path / "report.html"
    report.write_text("<h1>report</h1>")
    tracker = Tracker(Target.local(tmp_path, "diptych", mlflow_server), Outbox(tmp_path / "outbox"))
    tracker.check()
    parent = tracker.start("quickstart")
    child = tracker.start("quickstart/train", parent=parent)
    tracker.params(parent, {"train": {"lr": 1e-3}})
    tracker.series(child, [{"step": step, "time_ms": step, "loss": 1.0 / (step + 1)} for step in range(600)], {"loss": "train/loss"})
    tracker.metrics(parent, {"eval/emoji/zero-shot/acc1": 0.25, "nan": float("nan")})
    tracker.dataset(child, "pairs", "sha256:abc", "s3://pairs/1", "train", {"num_rows": 3})
    tracker.artifact(parent, report)
    for run in (child, parent):
        tracker.end(run)
    assert tracker.close() == 0, tracker.trouble
    assert tracker.outbox.refused == 0

    client = make_client(mlflow_server)
    run = client.get_run(tracker.run_id(parent))
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval/emoji/zero-shot/acc1"] == 0.25
    back = client.download_artifacts(run.info.run_id, "report.html", str(tmp_path_factory.mktemp("back")))
    assert Path(back).read_text() == report.read_text()
    stored = [entry["Key"] for entry in store.list_objects_v2(Bucket="mlflow")["Contents"]]
    assert [key for key in stored if key.endswith("/artifacts/report.html")]
    uri = urlsplit(compose["services"]["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"])
    with psycopg2.connect(host="127.0.0.1", port=postgres, user=uri.username, password=uri.password, dbname=uri.path[1:]) as database, database.cursor() as cursor:  # fmt: skip
        cursor.execute("SELECT name FROM runs ORDER BY name")
        assert cursor.fetchall() == [("quickstart",), ("quickstart/train",)]


@pytest.mark.server
def test_a_driver_may_write_to_the_database_itself(postgres, compose, tmp_path):
    uri = compose["services"]["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"].replace("postgres:5432", f"127.0.0.1:{postgres}")
    tracker = Tracker(Target.local(tmp_path, "direct", uri), Outbox(tmp_path / "outbox"))
    tracker.check()
    run = tracker.start("r")
    tracker.metrics(run, {"train/loss": 1.0})
    tracker.metrics(run, {"train/loss": 1.0})
    tracker.end(run)
    assert tracker.close() == 0, tracker.trouble
    assert make_client(uri).get_run(tracker.run_id(run)).data.metrics == {"train/loss": 1.0}
