import json
import subprocess
import sys
import threading

import pytest

from diptych.engine.outbox import DIED, Journal, Outbox

TARGET = {"uri": "sqlite:////nowhere.db", "experiment": "e", "artifacts": None}


@pytest.fixture
def outbox(tmp_path):
    return Outbox(tmp_path / "runs" / ".outbox")


def kinds(journal):
    return [event["kind"] for _, event in journal.waiting()]


def test_looking_makes_no_folder(outbox):
    assert outbox.behind == 0
    assert outbox.refused == 0
    assert outbox.adopt() == []
    assert not outbox.folder.exists()


def test_events_come_back_in_order_and_marks_are_kept(outbox):
    journal = outbox.open(TARGET)
    for number in range(5):
        journal.add("metrics", run="r", number=number, text="naïve \ud800 😀")
    assert journal.target == TARGET
    offsets = [offset for offset, _ in journal.waiting()]
    journal.runs["r"] = "m"
    journal.mark(offsets[3])
    assert [event["number"] for _, event in journal.waiting()] == [3, 4]
    journal._file.close()
    again = Journal.own(journal.path)
    assert again.runs == {"r": "m"}
    assert again.behind == 2
    assert outbox.behind == 2


def test_a_journal_that_is_sent_is_deleted_and_one_that_is_not_stays(outbox):
    journal, other = outbox.open(TARGET), outbox.open(TARGET)
    journal.mark(next(offset for offset, _ in journal.waiting()))
    journal.close()
    other.close()
    assert [path.name for path in outbox.folder.iterdir()] == [other.path.name]


def test_the_living_are_left_alone_and_the_dead_adopted_oldest_first(outbox):
    living, first, second = (outbox.open(TARGET) for _ in range(3))
    for journal in (first, second):
        journal._file.close()
    assert [journal.path for journal in outbox.adopt()] == [first.path, second.path]
    assert Journal.own(living.path) is None


def test_adopting_ends_what_was_left_open_once(outbox):
    journal = outbox.open(TARGET)
    journal.add("start", run="a")
    journal.add("start", run="b")
    journal.add("end", run="b", status="FINISHED")
    with journal.path.open("ab") as file:
        file.write(b'{"kind": "metr')  # the driver died in the middle of a word
    journal._file.close()
    for _ in range(2):
        (adopted,) = outbox.adopt()
        events = [event for _, event in adopted.waiting()]
        assert [event["kind"] for event in events] == ["open", "start", "start", "end", "tags", "end"]
        assert events[4]["run"] == "a"
        assert events[4]["values"] == DIED
        assert events[5]["status"] == "KILLED"
        assert events[5]["time_ms"] == events[3]["time_ms"]
        adopted._file.close()


def test_an_empty_file_is_nobodys_record(outbox):
    outbox.open(TARGET)._file.close()
    next(outbox.folder.iterdir()).write_bytes(b"")
    assert outbox.adopt() == []
    assert list(outbox.folder.iterdir()) == []


def test_a_damaged_line_is_an_event_of_its_own(outbox):
    journal = outbox.open(TARGET)
    with journal.path.open("ab") as file:
        file.write(b"\xff\xfe rubbish\n")
    journal.add("tags", run="r", values={})
    assert kinds(journal) == ["open", "damaged", "tags"]


def test_what_is_refused_is_kept_with_its_reason(outbox):
    journal = outbox.open(TARGET)
    journal.refuse({"kind": "params", "run": "r", "values": {"a": "1"}}, "changed value")
    line = json.loads((outbox.folder / "refused").read_text())
    assert line == {"reason": "changed value", "target": TARGET, "kind": "params", "run": "r", "values": {"a": "1"}}
    assert outbox.refused == 1
    assert outbox.behind == 1


def test_threads_do_not_mix_lines(outbox):
    journal = outbox.open(TARGET)
    threads = [threading.Thread(target=lambda: [journal.add("metrics", run="r", text="x" * 5000) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kinds(journal) == ["open"] + ["metrics"] * 80


def test_the_lock_goes_with_a_killed_process(outbox):
    code = f"""
import os, signal
from pathlib import Path
from diptych.engine.outbox import Outbox
journal = Outbox(Path({str(outbox.folder)!r})).open({TARGET!r})
journal.add("start", run="a")
print("ready", flush=True)
signal.pause()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    assert outbox.adopt() == []
    process.kill()
    process.wait()
    (adopted,) = outbox.adopt()
    assert kinds(adopted) == ["open", "start", "tags", "end"]
