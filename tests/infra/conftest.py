import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SECRETS = {"POSTGRES_PASSWORD": "pg4secret", "S3_USER": "diptych", "S3_PASSWORD": "s3secret99"}


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def image():
    """The image that everything runs: the package's name and version."""
    return f"diptych:{tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['version']}"


def substituted(text, values):
    """Compose's own rules for `${NAME}`, `${NAME:-default}`, `${NAME:?complaint}` and `$$`."""

    def value(match):
        name, _, rest = match["body"].partition(":")
        if not values.get(name) and rest.startswith("?"):
            raise KeyError(f"{name}: {rest[1:]}")
        return values.get(name) or (rest[1:] if rest.startswith("-") else "")

    return re.sub(r"(?<!\$)\$\{(?P<body>[^}]+)\}", value, text).replace("$$", "$")


@pytest.fixture(scope="session")
def compose_of():
    return lambda **values: yaml.safe_load(substituted((ROOT / "infra" / "compose.yaml").read_text(), values))


@pytest.fixture(scope="session")
def compose(compose_of):
    return compose_of(**SECRETS)


@pytest.fixture(scope="session")
def accepts():
    """Whether the installed `ray` or `mlflow` takes a command line, by its own parser; nothing runs."""

    def check(words):
        program, verb, *options = words
        if program == "ray":
            from ray.scripts.scripts import cli
        else:
            from mlflow.cli import cli
        command = cli.commands[verb]
        command.make_parser(command.context_class(command)).parse_args(list(options))
        return True

    return check
