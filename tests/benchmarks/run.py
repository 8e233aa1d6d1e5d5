"""Runs the benchmarks of this folder one after another, each in a process of its own, and shows their figures as one table.

    python tests/benchmarks/run.py [--list] [--only NAME …] [--write]

A benchmark is a script `bench_<name>.py` that prints lines of the form

    BENCH <name>: ours <x>, peer <y>, ratio <r>, target [<=|>=] <t> [(<remark>)]

A bare target is a least ratio. The exit code is 1 if a benchmark failed or printed no such line; a target that is missed is shown, and
is no failure: figures depend on the machine.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE.parents[1] / "docs" / "BENCHMARKS.md"
LIMIT_S = 600.0
LIMITS_S = {"pruning": 1200.0, "scale": 1200.0, "step": 1800.0, "zero_shot": 900.0, "optimizers": 1800.0}
PACKAGES = (
    "torch", "open_clip_torch", "ray", "polars", "numpy", "webdataset", "faiss-cpu", "pyahocorasick", "adamp", "tokenizers", "pillow",
)  # fmt: skip
LINE = re.compile(
    r"BENCH (?P<name>.+?): ours (?P<ours>.+?), peer (?P<peer>.+?), ratio (?P<ratio>[\d.]+|inf|nan),"
    r" target (?P<bound><=|>=)? ?(?P<target>[\d.]+)(?P<remark>.*)"
)


@dataclass(frozen=True)
class Figure:
    """One line of a benchmark. `at_most` says on which side of the target the ratio should be."""

    script: str
    name: str
    ours: str
    peer: str
    ratio: float
    target: float
    at_most: bool
    remark: str = ""
    day: str = ""

    @property
    def reached(self) -> bool:
        """Whether the ratio, as printed, is on the right side of the target."""
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        bound = "<=" if self.at_most else ">="
        reached = "yes" if self.reached else "no"
        return (self.script, self.name, self.ours, self.peer, f"{self.ratio:g}", f"{bound} {self.target:g}", reached, self.remark, self.day)


@dataclass(frozen=True)
class Failure:
    """A benchmark that gave no figures."""

    script: str
    why: str
    day: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        return (self.script, "", "", "", "", "", "failed", self.why, self.day)


@dataclass(frozen=True)
class Kept:
    """A row of the page as it stands there, of a benchmark that was not run now."""

    cells: tuple[str, ...]

    @property
    def script(self) -> str:
        """The benchmark that made it."""
        return self.cells[0]


Row = Figure | Failure | Kept
HEADER = ("script", "benchmark", "ours", "peer", "ratio", "target", "reached", "remark", "measured")
CELL = re.compile(r"(?<!\\)\|")


def scripts() -> dict[str, Path]:
    """The benchmarks by name."""
    return {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}


def figures(script: str, output: str) -> list[Figure]:
    """The figures among the lines that a benchmark printed."""
    found = []
    for line in output.splitlines():
        if match := LINE.fullmatch(line.strip()):
            part = match.groupdict()
            remark = part["remark"].strip(" ()")
            found.append(
                Figure(
                    script, part["name"], part["ours"], part["peer"], float(part["ratio"]), float(part["target"]), part["bound"] == "<=",
                    remark, today(),
                )
            )  # fmt: skip
    return found


def today() -> str:
    """The date of a row."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"


def standing(page: str) -> list[Kept]:
    """The rows of a page that was written before."""
    lines = [line.strip() for line in page.splitlines() if line.startswith("| ")]
    cells = [tuple(cell.strip().replace("\\|", "|") for cell in CELL.split(line)[1:-1]) for line in lines]
    return [Kept(row) for row in cells if len(row) == len(HEADER) and row != HEADER]


def measure(script: str, path: Path) -> list[Row]:
    """Runs one benchmark to its end or its time limit, shows what it prints, and gives its rows."""
    limit_s = LIMITS_S.get(script, LIMIT_S)
    process = subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit_s)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return [Failure(script, f"not done after {limit_s:.0f} s", today())]
    print(output, end="", flush=True)
    if process.returncode:
        return [Failure(script, (output.strip().splitlines() or ["no output"])[-1], today())]
    return list(figures(script, output)) or [Failure(script, "it printed no BENCH line", today())]


def table(rows: Sequence[Row]) -> str:
    """A Markdown table whose columns have equal widths, up to the remarks."""
    cells = [HEADER, *(tuple(cell.replace("|", "\\|") for cell in row.cells) for row in rows)]
    widths = [max(len(row[column]) for row in cells) if column < HEADER.index("remark") else 3 for column in range(len(HEADER))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def versions() -> str:
    """The versions of what was measured; a package that is not installed is left out."""
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def document(rows: Sequence[Row]) -> str:
    """The page `docs/BENCHMARKS.md`."""
    return "\n".join([
        "# Benchmarks",
        "",
        "Diptych beside its peers: in one process tree, interleaved, one thread each, best of several rounds, outputs compared. Times are CPU",
        "seconds unless a line says otherwise. What each one does stands at the top of its file in `tests/benchmarks/`. Rows come from",
        "`make bench`, or from `python tests/benchmarks/run.py --only NAME --write`, which leaves the others as they are.",
        "",
        f"Last written with {os.cpu_count()} cores, {cpu_model()}; {versions()}.",
        "",
        table(sorted(rows, key=lambda row: row.script)),
        "",
    ])  # fmt: skip


def main() -> int:
    """Runs what was asked for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = scripts()
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--only", nargs="+", choices=list(known), metavar="NAME", help=f"some of: {', '.join(known)}")
    parser.add_argument(
        "--write", action="store_true", help="write the rows to docs/BENCHMARKS.md, in place of those of the same benchmarks"
    )
    options = parser.parse_args()
    if options.list:
        print("\n".join(known))
        return 0
    rows: list[Row] = []
    for script in options.only or known:
        started = time.monotonic()
        print(f"== {script}", flush=True)
        rows += measure(script, known[script])
        print(f"   {time.monotonic() - started:.0f} s", flush=True)
    print(table(rows), flush=True)
    if options.write:
        measured = set(options.only or known)
        kept = [row for row in standing(OUT.read_text() if OUT.exists() else "") if row.script in known and row.script not in measured]
        OUT.write_text(document([*kept, *rows]))
        print(f"written to {OUT.relative_to(HERE.parents[1])}")
    return int(any(isinstance(row, Failure) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
