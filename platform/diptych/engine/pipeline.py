"""DVC's side of a run: which stages must run again and why, and the lock that `dvc repro` would have left.

DVC's calls used here are semi-public; this is the only file that makes them, and a contract test pins each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diptych
from diptych.core.errors import ConfigError, ResourceError


@dataclass(frozen=True)
class StageState:
    """A stage and why it must run; no reasons means that its outputs are up to date."""

    phase: str
    reasons: tuple[str, ...]

    @property
    def changed(self) -> bool:
        """Whether the stage has to run."""
        return bool(self.reasons)


class Pipeline:
    """The seven stages of one workflow in the DVC project at `root`."""

    def __init__(self, root: Path, workflow: str, phases: Sequence[str]) -> None:
        os.environ.setdefault("DVC_NO_ANALYTICS", "1")
        os.environ.setdefault("DVC_STUDIO_OFFLINE", "1")
        import logging

        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        logging.getLogger("dvc").setLevel(logging.ERROR)
        try:
            self._repo = Repo(str(root))
            # The file's full path, since DVC reads a bare name against the folder it was started in.
            target = f"{root / 'dvc.yaml'}:{phases[-1]}@{workflow}"
            stages = {stage.name.partition("@")[0]: stage for stage in self._repo.stage.collect(target, with_deps=True)}
        except DvcException as error:
            raise ConfigError.at("DVC cannot read its pipeline", root / "dvc.yaml", str(error), f"a stage for {workflow!r} in every phase",
                                 f"add {workflow!r} to `workflows` at the top of dvc.yaml") from error  # fmt: skip
        missing = [phase for phase in phases if phase not in stages]
        if missing:
            raise ConfigError.at(
                "dvc.yaml lacks stages", root / "dvc.yaml", f"no {', '.join(missing)}", f"one stage a phase: {', '.join(phases)}"
            )
        self._stages: Mapping[str, Any] = {phase: stages[phase] for phase in phases}
        self._refuse_missing_code(root)

    def _refuse_missing_code(self, root: Path) -> None:
        """Raises ConfigError for files that a stage rests on, that no stage makes and that are not there: DVC would say so after the work."""
        from dvc.dependency import ParamsDependency

        made = {str(out) for stage in self._stages.values() for out in stage.outs}
        needed = dict.fromkeys(str(dep) for stage in self._stages.values() for dep in stage.deps if not isinstance(dep, ParamsDependency))
        missing = [path for path in needed if path not in made and not (root / path).exists()]
        if missing:
            package = Path(diptych.__file__).parents[1]
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ConfigError.at("Code that dvc.yaml names is not in this project", root, f"no {missing[0]}{more}",
                                 "the package's source beside dvc.yaml: a change of it makes phases run again",
                                 f"ln -s {package} {root / package.name}")  # fmt: skip

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds DVC's lock: one run at a time may write `dvc.lock`. Raises ResourceError when another holds it."""
        from dvc.lock import LockError

        try:
            with self._repo.lock:
                yield
        except LockError as error:
            raise ResourceError.at("Another run holds DVC's lock", self._repo.root_dir, str(error), "one run at a time in a folder",
                                   "wait for the other run, or work in a second clone") from error  # fmt: skip

    def state(self, phase: str) -> StageState:
        """Whether a stage must run, in words. Content is compared, not time stamps."""
        stage = self._stages[phase]
        with nullcontext() if self._repo.lock.is_locked else self.locked(), self._inside():
            if not any(entry.hash_info for entry in (*stage.deps, *stage.outs)):  # not in the lock
                return StageState(phase, ("never ran",))
            status = stage.status(check_updates=True) if stage.changed() else {}
        return StageState(phase, tuple(_reasons(status.get(stage.addressing, []))))

    def save(self, phase: str) -> None:
        """Records the stage's dependencies and outputs in the cache and in `dvc.lock`, as `dvc repro` does after its command."""
        stage = self._stages[phase]
        with self._inside():
            stage.save()
            stage.commit()
            stage.dump(update_pipeline=False)

    def restore(self, phase: str) -> bool:
        """Checks a stage's outputs out of DVC's cache when they are missing but locked. True when that made it whole."""
        stage = self._stages[phase]
        with self._inside():
            if stage.changed_stage() or stage.changed_deps() if not stage.is_import else False:
                return False
            try:
                stage.checkout(force=True)
            except Exception:  # the cache does not have it: the phase simply runs again
                return False
            return not stage.changed_outs() if hasattr(stage, "changed_outs") else not stage.changed()

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """In the project's folder, since DVC resolves paths against the current one, and without DVC's own lines."""
        from dvc.ui import ui

        with chdir(self._repo.root_dir), _patched(ui, "write", _nothing):
            yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Prints nothing."""


@contextmanager
def _patched(owner: Any, name: str, value: Callable[..., None]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _reasons(status: Sequence[Any]) -> Iterator[str]:
    """DVC's status entries as short sentences: `workflows/q.yaml: train.optimizer.lr modified`."""
    for entry in status:
        if isinstance(entry, str):
            yield entry
            continue
        for kind, changes in entry.items():
            for path, change in changes.items():
                if isinstance(change, Mapping):
                    yield from (f"{path}: {key} {what}" for key, what in change.items())
                elif kind == "changed outs":
                    yield f"output {path} {change}"
                else:
                    yield f"{path} {change}"
