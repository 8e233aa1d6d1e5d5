"""The command line: verbs and flags. Nothing heavy is imported until a verb runs.

diptych run quickstart train.optimizer.lr=3e-4
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

WORKFLOW = "a workflow: a file, or the name of one in workflows/"
OVERRIDE = "values to change, e.g. train.optimizer.lr=3e-4 or prune.semantic-dedup.epsilon=0.1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb and gives the exit code: 0 done, 1 failed, 2 configuration, 3 data, 4 resources, 130 interrupted.

    User mistakes are printed in full and without a traceback.
    """
    parser = build_parser()
    _complete(parser)
    options = _parsed(parser, arguments)
    if not hasattr(options, "call"):
        parser.print_help()
        return 0
    from diptych.core.errors import DiptychError

    try:
        return int(options.call(options) or 0)
    except DiptychError as error:
        sys.stderr.write(f"\n{error}\n")
        return error.exit_code
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped cleanly; the same command continues from here\n")
        return 130


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options. `key=value` may also stand behind a flag, where argparse takes no more of them."""
    options, rest = parser.parse_known_args(arguments)
    name = next((name for name in ("overrides", "parameters") if hasattr(options, name)), None)
    unknown = [word for word in rest if name is None or "=" not in word or word.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if name is not None:
        setattr(options, name, [*getattr(options, name), *rest])
    return options


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answers a shell that asks for completions; see `diptych completion`."""
    import os

    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def _later(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    """A verb's function, imported when the verb runs."""

    def call(options: argparse.Namespace) -> int:
        verb: Callable[[argparse.Namespace], int] = getattr(importlib.import_module(f"diptych.cli.{module}"), function)
        return verb(options)

    return call


def build_parser() -> argparse.ArgumentParser:
    """The parser with all verbs."""
    parser = argparse.ArgumentParser(
        prog="diptych",
        description="Find out which data and which recipe make a better CLIP.",
        epilog="Start with: diptych run quickstart. Every verb has --help.",
    )
    parser.add_argument("--version", action="version", version=_version())
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", parser_class=argparse.ArgumentParser)
    _run_verbs(verbs)
    _question_verbs(verbs)
    _data_verbs(verbs)
    _service_verbs(verbs)
    return parser


def _version() -> str:
    from diptych import __version__

    return f"diptych {__version__}"


def _verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, call: str, epilog: str = ""
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=epilog)
    module, _, function = call.partition(":")
    parser.set_defaults(call=_later(module, function))
    return parser


def _workflow(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workflow", help=WORKFLOW)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help=OVERRIDE)


def _tracking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow server or database; default: mlflow.db in the project, or $MLFLOW_TRACKING_URI"
    )


def _run_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = _verb(verbs, "run", "run a workflow, or what has changed of it", "experiments:run")
    _workflow(run)
    run.add_argument("--in-process", action="store_true", help="without Ray, everything in this process: for a debugger")
    run.add_argument("--address", metavar="ADDRESS", help="a running Ray cluster, e.g. auto or ray://head:10001")
    run.add_argument("--until", metavar="PHASE", default="evaluate", help="stop after this phase")
    run.add_argument("--quiet", action="store_true", help="no progress lines")
    _tracking(run)
    plan = _verb(verbs, "plan", "show what would run, why, and what it will cost", "experiments:plan")
    _workflow(plan)
    claim = _verb(verbs, "claim", "run a paper's claim and say whether the effect shows", "experiments:claim")
    claim.add_argument("name", nargs="?", help="a claim in workflows/claims/; without it they are listed")
    claim.add_argument("--in-process", action="store_true", help="without Ray, arms in turn")
    _tracking(claim)
    evaluate = _verb(verbs, "evaluate", "measure many checkpoints on many sets, each picture decoded once", "experiments:evaluate",
                     "The file: name, models: {NAME: DIRECTORY or open_clip:ARCHITECTURE/TAG}, sets: {NAME: {data: …}}, benchmarks: […].")  # fmt: skip
    evaluate.add_argument("matrix", help="the matrix file")
    evaluate.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help="values to change, e.g. precision=half")
    evaluate.add_argument("--quiet", action="store_true", help="no progress lines")
    _tracking(evaluate)
    phase = verbs.add_parser("phase", description="Runs one phase; what dvc.yaml calls.")
    phase.add_argument("phase")
    _workflow(phase)
    phase.set_defaults(call=_later("experiments", "phase"))


def _question_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    compare = _verb(verbs, "compare", "test whether one run is better than another, on the same examples", "questions:compare")
    compare.add_argument(
        "runs", nargs="*", metavar="RUN", help="the baseline, then one or more other runs; without any all runs are listed"
    )
    compare.add_argument("--common", action="store_true", help="where some figures cannot be compared, compare the rest and list them")
    compare.add_argument("--html", metavar="FILE", help="the page; default: runs/.compare/A--B.html")
    compare.add_argument("--csv", metavar="FILE", help="also write the table, in full precision")
    compare.add_argument("--latex", metavar="FILE", help="also write the table for a paper")
    compare.add_argument("--resamples", type=int, default=10_000, help="bootstrap resamples")
    compare.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    lines = _verb(verbs, "lines", "draw the lines of data sources: accuracy under shift over accuracy without", "questions:lines",
                  "For runs that were evaluated with quality-not-quantity; several runs, e.g. seeds, share one chart.")  # fmt: skip
    lines.add_argument("runs", nargs="*", metavar="RUN", help="evaluated runs; without any those that have lines are listed")
    lines.add_argument("--html", metavar="FILE", help="the page; default: runs/.lines/RUN.html")
    trace = _verb(verbs, "trace", "follow a figure or a model back to its pairs, or a pair to its fate", "questions:trace")
    trace.add_argument("target", help="a figure (emoji/retrieval/text_to_image_r1), a model directory, or a pair's key")
    trace.add_argument("--run", metavar="RUN", help="look in this run only")
    methods = _verb(verbs, "methods", "list the methods, or show one with its parameters", "questions:methods")
    methods.add_argument("name", nargs="?", help="a method")
    methods.add_argument("--phase", help="only methods of this phase")


def _sampled(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--limit", type=int, default=200, help=what)
    parser.add_argument("--seed", type=int, default=0, help="names the draw of those shown")


def _data_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    data = verbs.add_parser(
        "data", help="look at pair datasets, move them in and out", description="Looks at pair datasets and moves them in and out."
    )
    known = "a folder, or RUN/PHASE as `data ls` prints it"
    data.set_defaults(call=lambda options: data.print_help())
    kinds = data.add_subparsers(title="verbs", metavar="VERB")
    _verb(kinds, "ls", "list the pair datasets of this project", "data:ls")
    show = _verb(kinds, "show", "a dataset's counts, columns, ledger and first pairs", "data:show")
    show.add_argument("dataset", help=known)
    show.add_argument("--verify", action="store_true", help="check every checksum")
    diff = _verb(kinds, "diff", "which pairs left, came or changed between two datasets", "data:diff")
    diff.add_argument("a", help=f"the earlier one: {known}")
    diff.add_argument("b", help="the later one")
    diff.add_argument("--html", metavar="FILE", help="also write a page with the pictures, before and after")
    _sampled(diff, "pairs shown of each kind")
    browse = _verb(kinds, "browse", "write a page: what stays beside what left, with reasons and evidence, to filter", "data:browse")
    browse.add_argument("dataset", help=known)
    browse.add_argument("--out", metavar="FILE", default=None, help="the HTML file; default: beside the dataset")
    _sampled(browse, "pairs shown, and rejects")
    card = _verb(
        kinds,
        "card",
        "write a data card: sources, licences, languages, lengths, concepts before and after, duplicates, ledger",
        "data:card",
    )
    card.add_argument("dataset", help=known)
    card.add_argument("--out", metavar="FILE", default=None, help="the HTML file; default: beside the dataset")
    card.add_argument("--sample", type=int, default=2000, help="pairs whose pictures and languages are looked at, drawn by key")
    card.add_argument("--seed", type=int, default=0, help="names the draw")
    export = _verb(kinds, "export", "write a dataset as WebDataset tars, Parquet with bytes, or a 🤗 data set", "data:export")
    export.add_argument("dataset", help=known)
    export.add_argument("out", help="the folder to write, or a store such as s3://bucket/folder")
    export.add_argument("--to", choices=["webdataset", "parquet", "hf"], default="webdataset")
    ingest = _verb(kinds, "ingest", "make a pair dataset from tars, Parquet, a folder, articles or a 🤗 data set", "data:ingest",
                   "Example: diptych data ingest parquet my-pairs path=pairs/*.parquet")  # fmt: skip
    ingest.add_argument("source", help="webdataset, parquet, folder, hf, biomedica …; see `diptych methods --phase ingest`")
    ingest.add_argument("out", help="the folder to write")
    ingest.add_argument(
        "parameters", nargs="*", default=[], metavar="key=value", help="the source's parameters; see `diptych methods SOURCE`"
    )


def _service_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    submit = _verb(verbs, "submit", "run a workflow on a cluster through Ray Jobs", "services:submit")
    _workflow(submit)
    submit.add_argument("--address", required=True, metavar="URL", help="the cluster's dashboard, e.g. http://head:8265")
    submit.add_argument("--dry-run", action="store_true", help="show what would be packed, send nothing")
    submit.add_argument("--detach", action="store_true", help="do not follow the log")
    submit.add_argument("--root", metavar="PATH", help="the project's folder on the cluster; default: this folder")
    _tracking(submit)
    ui = _verb(verbs, "ui", "open MLflow on the results", "services:ui")
    ui.add_argument("--port", type=int, default=5000)
    ui.add_argument("--host", default="127.0.0.1")
    _tracking(ui)
    doctor = _verb(verbs, "doctor", "check this machine and say what to mend", "services:doctor")
    doctor.add_argument("--address", metavar="URL", help="also ask this cluster")
    _tracking(doctor)
    completion = _verb(verbs, "completion", "print the shell's completion script", "services:completion",
                       'Example: eval "$(diptych completion bash)"')  # fmt: skip
    completion.add_argument("shell", choices=["bash", "zsh", "fish"])


if __name__ == "__main__":
    sys.exit(main())
