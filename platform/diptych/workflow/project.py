"""Where a project's files lie: the workflow files, the runs, the caches, the results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diptych.core.errors import ConfigError


@dataclass(frozen=True)
class Project:
    """A folder with `dvc.yaml`: `workflows/` and `infra/` in git, `runs/` and the results beside them."""

    root: Path

    @classmethod
    def find(cls, start: Path) -> Project:
        """The project that holds `start`, the nearest folder upwards with a `dvc.yaml`. Raises ConfigError when there is none."""
        start = start.resolve()
        for folder in (start, *start.parents):
            if (folder / "dvc.yaml").is_file():
                return cls(folder)
        raise ConfigError.at("This is not a Diptych project", start, "no dvc.yaml here or above", "a folder with dvc.yaml and workflows/",
                             "work in a clone of the repository, or copy its dvc.yaml and .dvc/, and link its platform/")  # fmt: skip

    @property
    def runs(self) -> Path:
        """Outputs, a folder a workflow."""
        return self.root / "runs"

    @property
    def cache(self) -> Path:
        """What may be deleted at any time: features, probes."""
        return self.runs / ".cache"

    @property
    def scratch(self) -> Path:
        """Unfinished work that a restart continues from."""
        return self.runs / ".scratch"

    @property
    def outbox(self) -> Path:
        """Tracking events on their way to MLflow."""
        return self.runs / ".outbox"

    def workflow_path(self, name: str) -> Path:
        """The file of a workflow given by name or path."""
        path = Path(name)
        if path.suffix in (".yaml", ".yml") or path.is_file():
            return path.resolve()
        for folder in ("", "claims", "examples"):
            file = self.root / "workflows" / folder / f"{name}.yaml"
            if file.exists():
                return file
        return self.root / "workflows" / f"{name}.yaml"
