import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from diptych.core.errors import ConfigError, ResourceError
from diptych.engine import pages, reach
from diptych.engine.tracking import Target


def test_a_port_that_is_taken_is_refused_with_another(project):
    target = Target.local(project, "diptych")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"--port {port + 1}"):
            pages.serve(target, "127.0.0.1", port)
    pages.check(target, "127.0.0.1", port)


def test_a_host_that_is_not_ours_is_refused(project):
    with pytest.raises(ResourceError, match="cannot listen here"):
        pages.check(Target.local(project, "diptych"), "192.0.2.1", 5000)


def test_a_server_has_its_own_pages(project):
    with pytest.raises(ConfigError, match="open http://mlflow:5000 in a browser"):
        pages.check(Target.local(project, "diptych", "http://mlflow:5000"), "127.0.0.1", 5000)


def test_the_address_opens_the_pages_for_training():
    assert pages.address("0.0.0.0", 5001) == "http://localhost:5001/#/experiments?workflowType=machine_learning"


@pytest.mark.server
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_pages_show_the_runs_and_end_without_trace(project, tracker_of, free_port, number):
    tracker = tracker_of(project)
    tracker.end(tracker.start("shown"))
    assert tracker.close() == 0
    port = free_port()
    code = f"""
import signal, sys
from pathlib import Path
from diptych.engine import pages
from diptych.engine.tracking import Target
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pages.serve(Target.local(Path({str(project)!r}), "diptych"), "127.0.0.1", {port}))
"""
    ui = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    uri = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 90
    while reach.listening(uri, 1):
        assert ui.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    request = urllib.request.Request(
        f"{uri}/api/2.0/mlflow/runs/search", json.dumps({"experiment_ids": ["1"]}).encode(), {"Content-Type": "application/json"}
    )
    runs = json.load(urllib.request.urlopen(request, timeout=30))["runs"]
    assert [run["info"]["run_name"] for run in runs] == ["shown"]
    os.kill(ui.pid, number)
    assert ui.wait(30) == 0
    assert reach.listening(uri, 1)
