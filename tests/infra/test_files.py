"""The files in infra/ as far as a machine without Docker and Kubernetes can check them."""

import fnmatch
import importlib.util
import re
import shlex
import shutil
import subprocess

import click
import jsonschema
import pytest
import ray
import yaml

from diptych.engine import remote

PINNED = re.compile(r"^[\w./-]+:(?!latest$)[\w.-]*\d[\w.-]*$")

# ---------------------------------------------------------------- Dockerfile


@pytest.fixture(scope="module")
def dockerfile(root):
    text = re.sub(r"\\\n", " ", (root / "infra" / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def all_of(dockerfile, instruction):
    return [value for name, value in dockerfile if name == instruction]


def test_the_base_image_is_pinned_to_the_projects_python(dockerfile):
    (base,) = all_of(dockerfile, "FROM")
    assert PINNED.match(base)
    assert base.startswith("python:3.11.")


def test_everything_that_is_copied_exists_and_is_not_ignored(root, dockerfile):
    ignored = (root / ".dockerignore").read_text().split()
    copied = [name for value in all_of(dockerfile, "COPY") for name in value.split()[:-1]]
    assert {"requirements.lock", "platform", "workflows", "dvc.yaml"} <= set(copied)
    for name in copied:
        assert (root / name).exists(), name
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in ignored), name


def test_the_image_runs_as_a_user_who_owns_the_shared_folder(dockerfile):
    assert dockerfile[-2:] == [("USER", "diptych"), ("CMD", '["diptych", "--help"]')]
    assert any(
        "useradd" in value and "--uid 1000" in value and "chown -R diptych /opt/diptych /shared" in value
        for value in all_of(dockerfile, "RUN")
    )


def test_what_is_installed_is_locked(root, dockerfile):
    runs = " ".join(all_of(dockerfile, "RUN"))
    assert "--require-hashes" in runs
    assert re.search(r"pip install --no-cache-dir uv==\d", runs)
    lock = (root / "requirements.lock").read_text()
    for package in ("psycopg2-binary", "boto3", f"ray=={ray.__version__}"):  # MLflow's database, MLflow's store
        assert re.search(rf"^{re.escape(package)}(\[[\w,]+\])?(==| )", lock, re.MULTILINE), package


def test_secrets_and_data_stay_out_of_the_image_and_of_git(root):
    ignored = (root / ".dockerignore").read_text().split()
    assert {".git", "runs", "infra", ".venv"} <= set(ignored)
    assert ".env" in (root / "infra" / ".gitignore").read_text().split()


# ---------------------------------------------------------------- compose

SERVICE = {
    "type": "object",
    "required": ["image"],
    "additionalProperties": False,
    "properties": {
        "image": {"type": "string", "pattern": PINNED.pattern},
        "build": {
            "type": "object",
            "required": ["context", "dockerfile"],
            "additionalProperties": False,
            "properties": {"context": {}, "dockerfile": {}},
        },
        "restart": {"enum": ["unless-stopped"]},
        "environment": {"type": "object", "additionalProperties": {"type": "string", "minLength": 1}},
        "command": {"type": "array", "items": {"type": "string"}},
        "entrypoint": {"type": "array", "items": {"type": "string"}},
        "volumes": {"type": "array", "items": {"type": "string", "pattern": "^[a-z0-9]+:/"}},
        "ports": {"type": "array", "items": {"type": "string", "pattern": r"^127\.0\.0\.1:\d+:\d+$"}},
        "shm_size": {"type": "string", "pattern": r"^\d+gb$"},
        "depends_on": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["condition"],
                "properties": {"condition": {"enum": ["service_healthy", "service_completed_successfully", "service_started"]}},
            },
        },
        "healthcheck": {
            "type": "object",
            "required": ["test", "interval", "timeout", "retries"],
            "additionalProperties": False,
            "properties": {"test": {"type": "array"}, "interval": {}, "timeout": {}, "start_period": {}, "retries": {"type": "integer"}},
        },
    },
}
COMPOSE = {
    "type": "object",
    "required": ["name", "services", "volumes"],
    "additionalProperties": False,
    "patternProperties": {"^x-": {}},
    "properties": {
        "name": {"type": "string"},
        "services": {"type": "object", "additionalProperties": SERVICE},
        "volumes": {"type": "object"},
    },
}


def test_compose_fits_the_schema(compose):
    jsonschema.validate(compose, COMPOSE)


def test_compose_itself_takes_the_file(root, tmp_path):
    known = shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
    if not known:
        pytest.skip("docker compose is not installed")
    environment = tmp_path / ".env"
    environment.write_text("POSTGRES_PASSWORD=a\nS3_USER=b\nS3_PASSWORD=c\n")
    command = ["docker", "compose", "-f", str(root / "infra/compose.yaml"), "--env-file", str(environment), "config", "--quiet"]
    subprocess.run(command, check=True)


def test_services_wait_for_services_that_can_tell_they_are_ready(compose):
    services = compose["services"]
    assert {"postgres", "s3", "mlflow", "ray-head", "ray-worker"} <= set(services)
    for service in services.values():
        for name, demand in service.get("depends_on", {}).items():
            assert name in services
            assert demand["condition"] != "service_healthy" or "healthcheck" in services[name]


def test_volumes_are_declared_and_used(compose):
    used = {volume.split(":")[0] for service in compose["services"].values() for volume in service.get("volumes", [])}
    assert used == set(compose["volumes"])
    for name in ("ray-head", "ray-worker"):
        assert "shared:/shared" in compose["services"][name]["volumes"]


def test_our_image_is_that_of_this_version(compose, image, root):
    ours = {service["image"] for service in compose["services"].values() if "build" in service}
    assert ours == {image}
    assert f"-t {image} ." in (root / "infra/Dockerfile").read_text()


def test_what_ray_and_mlflow_are_started_with_is_known_to_them(compose, accepts):
    for name in ("mlflow", "ray-head", "ray-worker"):
        assert accepts(compose["services"][name]["command"])
    assert compose["services"]["ray-head"]["healthcheck"]["test"][1:3] == ["ray", "health-check"]


def test_an_unknown_option_would_be_seen(accepts):
    with pytest.raises(click.NoSuchOption):
        accepts(["ray", "start", "--haed"])
    with pytest.raises(click.NoSuchOption):
        accepts(["mlflow", "server", "--artefacts-destination", "s3://mlflow"])


def test_a_missing_password_stops_compose(compose_of):
    with pytest.raises(KeyError, match="set POSTGRES_PASSWORD in"):
        compose_of(S3_USER="a", S3_PASSWORD="b")


def test_the_example_names_every_variable(root):
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", (root / "infra/compose.yaml").read_text()))
    example = {
        line.partition("=")[0]: line.partition("=")[2]
        for line in (root / "infra/.env.example").read_text().splitlines()
        if re.match(r"\w+=", line)
    }
    assert used == set(example)
    assert not any(value for name, value in example.items() if name.endswith("PASSWORD"))


# ---------------------------------------------------------------- ray up


def test_ray_up_takes_its_file(root, image, accepts):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((root / "infra/ray-up.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["docker"]["image"] == image
    for line in [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]:
        for part in line.split(";"):
            words = shlex.split(part)
            assert words[0] == "ulimit" or accepts(words)


# ---------------------------------------------------------------- KubeRay

QUANTITY = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?$"}
RESOURCES = {"type": "object", "required": ["cpu", "memory"], "additionalProperties": QUANTITY}
CONTAINER = {
    "type": "object",
    "required": ["name", "image", "resources", "env", "volumeMounts"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "image": {"type": "string", "pattern": PINNED.pattern},
        "ports": {"type": "array", "items": {"type": "object", "required": ["containerPort", "name"]}},
        "resources": {
            "type": "object",
            "required": ["requests", "limits"],
            "additionalProperties": False,
            "properties": {"requests": RESOURCES, "limits": RESOURCES},
        },
        "env": {"type": "array", "items": {"type": "object", "required": ["name", "value"]}},
        "volumeMounts": {"type": "array", "items": {"type": "object", "required": ["name", "mountPath"]}},
    },
}
TEMPLATE = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "spec": {
            "type": "object",
            "required": ["containers", "volumes", "securityContext"],
            "additionalProperties": False,
            "properties": {
                "containers": {"type": "array", "minItems": 1, "items": CONTAINER},
                "volumes": {"type": "array", "items": {"type": "object", "required": ["name"]}},
                "securityContext": {"type": "object", "required": ["runAsUser", "fsGroup"]},
            },
        }
    },
}
PARAMS = {"type": "object", "additionalProperties": {"type": "string"}}  # KubeRay refuses numbers here
CLUSTER = {
    "type": "object",
    "required": ["rayVersion", "headGroupSpec", "workerGroupSpecs"],
    "additionalProperties": False,
    "properties": {
        "rayVersion": {"const": ray.__version__},
        "enableInTreeAutoscaling": {"type": "boolean"},
        "autoscalerOptions": {"type": "object"},
        "headGroupSpec": {"type": "object", "required": ["rayStartParams", "template"], "additionalProperties": False, "properties": {"rayStartParams": PARAMS, "template": TEMPLATE}},
        "workerGroupSpecs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"],
                "additionalProperties": False,
                "properties": {
                    "groupName": {"type": "string"}, "replicas": {"type": "integer"}, "minReplicas": {"type": "integer"}, "maxReplicas": {"type": "integer"},
                    "rayStartParams": PARAMS, "template": TEMPLATE,
                },
            },
        },
    },
}  # fmt: skip
JOB = {
    "type": "object",
    "required": ["entrypoint", "rayClusterSpec", "shutdownAfterJobFinishes"],
    "additionalProperties": False,
    "properties": {
        "entrypoint": {"type": "string"}, "shutdownAfterJobFinishes": {"const": True}, "ttlSecondsAfterFinished": {"type": "integer"},
        "backoffLimit": {"type": "integer"}, "rayClusterSpec": CLUSTER,
    },
}  # fmt: skip


def document(kind, spec):
    properties = {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": kind},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": spec,
    }
    return {"type": "object", "required": list(properties), "additionalProperties": False, "properties": properties}


def read(root, name):
    return yaml.safe_load((root / "infra" / name).read_text())


def clusters(root):
    return [read(root, "raycluster.yaml")["spec"], read(root, "rayjob.yaml")["spec"]["rayClusterSpec"]]


def groups(root):
    return [group for cluster in clusters(root) for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_kuberays_files_fit_the_schema(root):
    jsonschema.validate(read(root, "raycluster.yaml"), document("RayCluster", CLUSTER))
    jsonschema.validate(read(root, "rayjob.yaml"), document("RayJob", JOB))


def test_every_pod_runs_our_image_and_mounts_what_exists(root, image):
    claim = read(root, "volume.yaml")
    assert (claim["kind"], claim["spec"]["accessModes"]) == ("PersistentVolumeClaim", ["ReadWriteMany"])
    for group in groups(root):
        spec = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        for container in spec["containers"]:
            assert container["image"] == image
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
            assert {"name": "MLFLOW_TRACKING_URI", "value": "http://mlflow:5000"} in container["env"]


def test_ray_knows_the_parameters_it_is_started_with(root, accepts):
    for group in groups(root):
        assert accepts(["ray", "start", *(f"--{name}={value}" for name, value in group["rayStartParams"].items())])
    for cluster in clusters(root):
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_jobs_entrypoint_is_ours(root):
    words = shlex.split(read(root, "rayjob.yaml")["spec"]["entrypoint"])
    assert words[:2] == ["python", "-m"]
    assert importlib.util.find_spec(words[2]).origin == remote.__file__
    options = remote.build_parser().parse_args(words[3:])
    workdir = re.search(r"^WORKDIR (.*)$", (root / "infra/Dockerfile").read_text(), re.MULTILINE)[1]
    assert str(options.pack) == workdir
    assert options.home.parts[1] == "shared"
    assert (root / options.workflow).is_file()
