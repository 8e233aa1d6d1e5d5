"""How fast figures and captions come out of article packages, beside pubmed_parser, on which PMC-15M's own pipeline rests.

    python tests/benchmarks/bench_jats.py [--python PYTHON]

Both sides open gzipped tars and give picture file, id, label and caption of every figure: the peer by unpacking to disk and parsing there,
as the pipeline does, ours in memory. The peer runs in a process and an environment of its own: that of `--python`, or one that is made on
first use in a cache folder ($DIPTYCH_BENCH_CACHE, else ~/.cache/diptych-bench). The second line is the whole of ingest: pictures decoded, hashed and packed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path

ARTICLES, FIGURES, PARAGRAPHS, ROUNDS, TARGET = 120, 6, 110, 3, 1.3
PEER = "pubmed_parser==0.5.1"

Figures = dict[str, list[list[str]]]


def build(folder: Path) -> None:
    """Packages of about the size of a biologist's article: 70 kB of text, six figures of long captions."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pairs" / "articles"))
    from packages import WORDS, article, packed, photo

    pictures = [photo(seed, size=(600, 400)) for seed in range(FIGURES)]
    for number in range(ARTICLES):
        draw = random.Random(number)
        said = [" ".join(draw.choices(WORDS, k=90)) for _ in range(PARAGRAPHS)]
        body = [f'<p>{text} <xref ref-type="bibr" rid="b{i}">{i}</xref> <italic>in vivo</italic> (<xref ref-type="fig" rid="F1">1</xref>).</p>'
                for i, text in enumerate(said)]  # fmt: skip
        for index in range(FIGURES):
            caption = f"<title>{said[index][:60]}</title><p>(<bold>A</bold>) {said[index]} &amp; so on.</p><p>(<bold>B</bold>) {said[-index]}.</p>"
            body.insert(
                8 * index,
                f'<fig id="F{index}"><label>Figure {index}</label><caption>{caption}</caption><graphic xlink:href="g{index}"/></fig>',
            )
        files = {f"P{number}/g{index}.jpg": picture for index, picture in enumerate(pictures)}
        packed(
            folder / f"P{number:04d}.tar.gz",
            {f"P{number}/a.nxml": article("".join(body), pmid=str(number + 1), pmc=str(number + 1)), **files},
        )


def ours(folder: Path) -> Figures:
    """Ours."""
    from diptych.pairs.articles.article import parse
    from diptych.pairs.articles.package import PackageLimits, open_package

    found: Figures = {}
    for path in sorted(folder.glob("*.tar.gz")):
        package = open_package(path, PackageLimits())
        for name in package.articles:
            figures = parse(package.load(name), mentions="none").figures
            found[path.name] = [[Path(package.find(f.graphics[0][0], name) or "").name, f.id, f.label, f.caption] for f in figures]
    return found


def peer(folder: Path) -> Figures:
    """The steps of PMC-15M's pipeline: unpack, parse, put `.jpg` behind the references, clean up."""
    import pubmed_parser

    found: Figures = {}
    for path in sorted(folder.glob("*.tar.gz")):
        with tempfile.TemporaryDirectory() as unpacked:
            with tarfile.open(path) as tar:
                tar.extractall(unpacked, filter="data")
            for name in map(str, Path(unpacked).rglob("*.nxml")):
                figures = pubmed_parser.parse_pubmed_caption(name)
                found[path.name] = [[f["graphic_ref"] + ".jpg", f["fig_id"], f["fig_label"], f["fig_caption"]] for f in figures]
    return found


def best_s(work: Callable[[Path], object], folder: Path) -> float:
    """CPU seconds of the best round, those of the system included."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work(folder)
        rounds.append(time.process_time() - start)
    return min(rounds)


def ingest_s(folder: Path) -> float:
    """CPU seconds of a whole ingest."""
    from diptych.pairs.ingest import ingest_all
    from diptych.pairs.sources.biomedica import Config

    def work(packages: Path) -> None:
        ingest_all(Config(path=str(packages)).build(), out)

    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out"
        return best_s(work, folder)


def beside(python: str, folder: Path) -> tuple[float, Figures]:
    """CPU seconds and figures of the peer, in its own process."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, __file__, "--peer", str(folder)], check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"the peer did not run (pubmed_parser is needed, see --python):\n{done.stderr[-500:]}")
    seconds, figures = json.loads(done.stdout.splitlines()[-1])
    return float(seconds), figures


def own_python() -> str:
    """An interpreter that has the peer; installs it on first use."""
    cache = Path(os.environ.get("DIPTYCH_BENCH_CACHE", Path.home() / ".cache" / "diptych-bench"))
    python = cache / PEER / "bin" / "python"
    if not python.is_file():
        venv.create(cache / PEER, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", PEER], check=True)
    return str(python)


def main() -> None:
    """Prints two lines; fails if the two sides find different figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", help="an interpreter that has pubmed_parser")
    parser.add_argument("--peer")
    options = parser.parse_args()
    if options.peer:
        print(json.dumps([best_s(peer, Path(options.peer)), peer(Path(options.peer))]))
        return
    folder = Path(tempfile.mkdtemp())
    try:
        build(folder)
        theirs_s, theirs = beside(options.python or own_python(), folder)
        mine_s, mine = best_s(ours, folder), ours(folder)
        assert tidy(mine) == tidy(theirs), "the two sides found different figures"
        whole_s = ingest_s(folder)
    finally:
        shutil.rmtree(folder)
    figures = ARTICLES * FIGURES
    per_s = [f"{ARTICLES / seconds:.0f} articles/s, {figures / seconds:.0f} figures/s" for seconds in (mine_s, theirs_s, whole_s)]
    print(f"BENCH figures of articles: ours {per_s[0]}, peer {per_s[1]}, ratio {theirs_s / mine_s:.2f}, target {TARGET}")
    remark = "all of ingest beside the peer's bare extraction"
    print(f"BENCH articles to pairs: ours {per_s[2]}, peer {per_s[1]}, ratio {theirs_s / whole_s:.2f}, target 0.1 ({remark})")


def tidy(found: Figures) -> Figures:
    """File, id, label and caption without differences of white space."""
    return {
        name: [[Path(file).name, id, label.strip(), " ".join(caption.split())] for file, id, label, caption in rows]
        for name, rows in found.items()
    }


if __name__ == "__main__":
    main()
