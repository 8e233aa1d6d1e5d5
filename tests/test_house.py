"""The rules of the house: light imports, file and function sizes, no name of a registry or a machine's path, the folder `platform`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "platform" / "diptych").rglob("*.py"))
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80


def test_importing_diptych_and_asking_for_help_import_nothing_heavy() -> None:
    script = (
        "import sys, contextlib, io, diptych\nfrom diptych.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main(['--help'])\n"
        "print([name for name in ('torch', 'ray', 'mlflow', 'polars', 'numpy', 'pydantic', 'dvc') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_standard_library_keeps_its_platform_module() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.system())"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "Linux"
    assert not (ROOT / "platform" / "__init__.py").exists()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long


def test_most_files_are_short() -> None:
    lengths = sorted(path.read_text().count("\n") for path in SOURCES if path.stat().st_size)
    assert lengths[int(0.9 * len(lengths))] <= 350


def test_no_pickle_and_no_shell_strings() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert "shell=True" not in text, path
        assert "pickle.load(" not in text, path
        assert "weights_only=False" not in text, path
        assert "allow_pickle=True" not in text, path


def test_every_catalogue_row_has_a_config_that_builds_and_knows_its_name() -> None:
    from diptych.core import catalogue

    for row in catalogue.rows().values():
        config = catalogue.config_class(row)
        assert callable(getattr(config, "build", None)), row.name
        assert config.model_fields["method"].default == row.name
        for name, field in config.model_fields.items():
            assert name == "method" or field.description, f"{row.name}.{name} has no description"
