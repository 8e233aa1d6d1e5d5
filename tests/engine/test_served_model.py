import io
import os
import subprocess
import sys

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from diptych.core.errors import DataError
from diptych.engine import registry
from diptych.engine.mlflow_events import Receiver, make_client
from diptych.models import clip
from diptych.models.preprocess import preprocess

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TEXTS = ["a cat", "naïve 😀 dog", "a " * 60]


def png(seed, size=(40, 24), mode="RGB"):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return clip.build(TINY).eval()


@pytest.fixture(scope="module")
def directory(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "train"
    clip.save(encoder, folder, {"run": "test"})
    return folder


@pytest.fixture(scope="module")
def packaged(directory, tmp_path_factory):
    target = tmp_path_factory.mktemp("packaged") / "model"
    make_client("sqlite://")
    registry.package(directory, target)
    return target


@pytest.fixture(scope="module")
def served(packaged):
    return mlflow.pyfunc.load_model(str(packaged))


def text_features(encoder, texts):
    with torch.inference_mode():
        return encoder.encode_text(torch.from_numpy(encoder.tokenizer.encode(texts))).numpy()


def image_features(encoder, images):
    pixels = np.stack([preprocess(Image.open(io.BytesIO(data)), encoder.image_size) for data in images])
    with torch.inference_mode():
        return encoder.encode_image(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()


def test_texts(served, encoder):
    features = served.predict(pd.DataFrame({"text": TEXTS}))
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, text_features(encoder, TEXTS), rtol=0, atol=1e-6)
    assert np.abs(features[0] - features[1]).max() > 0.01


def test_pictures(served, encoder):
    images = [png(0), png(1, (16, 16)), png(2, mode="L"), png(3, mode="P")]
    np.testing.assert_allclose(served.predict(pd.DataFrame({"image": images})), image_features(encoder, images), rtol=0, atol=1e-6)


def test_a_mixed_frame_keeps_the_order_of_its_rows(served, encoder):
    features = served.predict(pd.DataFrame({"text": ["a cat", None, "a dog"], "image": [None, png(0), None]}))
    np.testing.assert_allclose(features[[0, 2]], text_features(encoder, ["a cat", "a dog"]), rtol=0, atol=1e-6)
    np.testing.assert_allclose(features[[1]], image_features(encoder, [png(0)]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("row", [{"text": ["a"], "image": [png(0)]}, {"text": [None], "image": [None]}])
def test_a_row_with_both_or_neither_is_refused(served, row):
    with pytest.raises(DataError, match="Every row is a text or a picture"):
        served.predict(pd.DataFrame(row))


def test_a_broken_picture_is_refused(served):
    with pytest.raises(DataError, match="cannot be decoded"):
        served.predict(pd.DataFrame({"image": [png(0)[:60]]}))
    with pytest.raises(DataError, match="cannot be decoded"):
        served.predict(pd.DataFrame({"image": [b"GIF89a, or not"]}))


def test_the_signature_says_what_goes_in_and_comes_out(served):
    signature = served.metadata.signature
    assert [(column.name, column.type.name, column.required) for column in signature.inputs.inputs] == [
        ("text", "string", False),
        ("image", "binary", False),
    ]
    (output,) = signature.outputs.inputs
    assert output.type == np.float32
    assert output.shape == (-1, 16)


def test_nothing_is_pickled_and_the_code_is_small(directory, tmp_path):
    packaged = tmp_path / "model"  # a package of its own: loading one leaves byte code in it
    registry.package(directory, packaged)
    names = [path.name for path in packaged.rglob("*") if path.is_file()]
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pyc", ".pt", ".bin"))]
    assert sum(path.stat().st_size for path in (packaged / "code").rglob("*") if path.is_file()) < 500_000


def test_it_loads_where_diptych_is_not_installed(packaged, encoder):
    code = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
sys.path = [entry for entry in sys.path if "__editable__" not in entry and not entry.endswith("platform")]
sys.path_hooks = [hook for hook in sys.path_hooks if "editable" not in str(hook)]
try:
    import diptych
    raise SystemExit("diptych is importable; the test shows nothing")
except ModuleNotFoundError:
    pass
import mlflow, pandas
model = mlflow.pyfunc.load_model({str(packaged)!r})
features = model.predict(pandas.DataFrame({{"text": ["a cat"]}}))
import diptych
assert diptych.__file__.startswith({str(packaged)!r}), diptych.__file__
print(*features[0])
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=packaged)
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(np.array(done.stdout.split()[-16:], np.float32), text_features(encoder, ["a cat"])[0], rtol=0, atol=1e-6)


# ---------------------------------------------------------------- the registry


def logged(client, name="quick"):
    """The logged models and registered versions of everything in the experiment."""
    experiment = client.get_experiment_by_name("diptych").experiment_id
    return client.search_logged_models([experiment]), client.search_model_versions(f"name = '{name}'")


def loaded(uri, source):
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        return mlflow.pyfunc.load_model(source)
    finally:
        mlflow.set_tracking_uri(before)


def test_a_run_puts_its_model_into_the_registry(project, directory, tracker_of, encoder):
    tracker = tracker_of(project)
    run = tracker.start("quick/train")
    tracker.model(run, directory, "quick")
    tracker.end(run)
    assert tracker.close() == 0
    assert tracker.outbox.refused == 0
    client = make_client(tracker.target.uri)
    (model,), (version,) = logged(client)
    assert str(model.status) == "READY"
    assert model.source_run_id == version.run_id == tracker.run_id(run)
    assert [output.model_id for output in client.get_run(tracker.run_id(run)).outputs.model_outputs] == [model.model_id]
    features = loaded(tracker.target.uri, "models:/quick/1").predict(pd.DataFrame({"text": TEXTS}))
    np.testing.assert_allclose(features, text_features(encoder, TEXTS), rtol=0, atol=1e-6)


class Mortal:
    """A client whose driver is killed after the n-th call that writes."""

    def __init__(self, client, lives):
        self.client, self.lives = client, lives

    def __getattr__(self, name):
        method = getattr(self.client, name)
        if name.startswith(("search", "get")):
            return method

        def call(*arguments, **options):
            result = method(*arguments, **options)
            self.lives -= 1
            if self.lives == 0:
                raise KeyboardInterrupt
            return result

        return call


def test_a_driver_killed_between_any_two_steps_registers_the_model_once(project, directory):
    uri = f"sqlite:///{project / 'mlflow.db'}"
    receiver = Receiver(uri, "diptych", (project / "mlruns").as_uri())
    receiver.connect()
    client, experiment = receiver._client, receiver._experiment_id
    for lives in range(1, 20):
        name = f"killed-{lives}"
        run = client.create_run(experiment).info.run_id
        mortal = Mortal(client, lives)
        try:
            registry.register(mortal, experiment, run, directory, name)
        except KeyboardInterrupt:
            registry.register(client, experiment, run, directory, name)
        models = [model for model in client.search_logged_models([experiment]) if model.source_run_id == run]
        assert len(models) == 1
        assert str(models[0].status) == "READY"
        assert len(client.search_model_versions(f"name = '{name}'")) == 1
        if mortal.lives > 0:
            break
    assert 5 <= lives < 19, "every step was a place to die at"


@pytest.mark.server
def test_through_a_server(project, directory, tracker_of, mlflow_server, encoder):
    server = mlflow_server()
    tracker = tracker_of(project, server.uri)
    tracker.check()
    for _ in range(2):
        run = tracker.start("quick/train")
        tracker.model(run, directory, "quick")
        tracker.end(run)
    assert tracker.close() == 0, tracker.trouble
    assert tracker.outbox.refused == 0
    models, versions = logged(make_client(server.uri))
    assert len(models) == 2
    assert sorted(int(version.version) for version in versions) == [1, 2]
    features = loaded(server.uri, "models:/quick/2").predict(pd.DataFrame({"text": TEXTS}))
    np.testing.assert_allclose(features, text_features(encoder, TEXTS), rtol=0, atol=1e-6)
