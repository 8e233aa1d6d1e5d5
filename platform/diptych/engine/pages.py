"""MLflow's own pages, served on the results of this project."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys

from diptych.core.errors import ConfigError, ResourceError
from diptych.engine.tracking import Target

STOP_S = 10.0
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def address(host: str, port: int) -> str:
    """What to open: MLflow's pages for training, without those for language-model applications."""
    shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://{shown}:{port}/#/experiments?workflowType=machine_learning"


def check(target: Target, host: str, port: int) -> None:
    """Raises ResourceError when the port is taken, ConfigError when `target` is a server, which has pages of its own."""
    if target.uri.startswith(("http://", "https://")):
        raise ConfigError.at(
            "This MLflow server has its own pages", "tracking URI", target.shown, "a database", f"open {target.shown} in a browser"
        )
    _free(host, port)


def serve(target: Target, host: str, port: int) -> int:
    """Runs MLflow's pages on a database until Ctrl-C; gives the exit code. Raises as `check` does."""
    check(target, host, port)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        target.uri,
        "--host",
        host,
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    if target.artifacts:
        command += ["--default-artifact-root", target.artifacts]
    # A session of its own: a signal reaches us alone, and we end the server with all that it has started.
    process = subprocess.Popen(command, env={**QUIET, **os.environ}, start_new_session=True)  # noqa: S603 - a fixed program
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(process)
        for number, handler in before.items():
            signal.signal(number, handler)


def _free(host: str, port: int) -> None:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        headline, fix = (
            ("The port is taken", f"diptych ui --port {port + 1}") if taken else ("MLflow cannot listen here", "another --host or --port")
        )
        raise ResourceError.at(headline, f"{host}:{port}", error.strerror or str(error), "a free port of this machine", fix) from None


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
