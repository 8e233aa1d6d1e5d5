"""The model in MLflow's registry: texts and pictures in, features out. MLflow runs this file as code; nothing is pickled."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from numpy.typing import NDArray

MAX_PIXELS = 1 << 26
BATCH = 256


class ServedModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A dual encoder behind MLflow's `predict`."""

    def load_context(self, context: Any) -> None:
        """Loads the model directory among the artifacts."""
        from diptych.models import clip

        self.encoder = clip.load(Path(context.artifacts["model"])).eval()

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> NDArray[np.float32]:
        """Unit-norm features, float32 `[rows, D]`, of a frame with a `text` or an `image` (encoded bytes) in every row.

        Raises DataError for a row with both or neither, and for a picture that cannot be decoded.
        """
        del context, params
        texts, images = (_column(model_input, name) for name in ("text", "image"))
        _one_each(texts, images)
        feature_ND = np.empty((len(model_input), int(self.encoder.config["embed_dim"])), np.float32)
        for column, encode in ((texts, self._encode_texts), (images, self._encode_images)):
            rows = [row for row, value in enumerate(column) if value is not None]
            for start in range(0, len(rows), BATCH):
                part = rows[start : start + BATCH]
                feature_ND[part] = encode([column[row] for row in part])
        return feature_ND

    def _encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            feature_ND = self.encoder.encode_text(torch.from_numpy(self.encoder.tokenizer.encode(texts)))
        return _numpy(feature_ND)

    def _encode_images(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        import torch

        image_NHWC = np.stack([self._pixels(data) for data in images])
        with torch.inference_mode():
            feature_ND = self.encoder.encode_image(torch.from_numpy(image_NHWC).permute(0, 3, 1, 2))
        return _numpy(feature_ND)

    def _pixels(self, data: bytes) -> NDArray[np.uint8]:
        from PIL import Image, UnidentifiedImageError

        from diptych.core.errors import DataError
        from diptych.models import preprocess

        cfg = self.encoder.preprocess_cfg
        try:
            with Image.open(io.BytesIO(data)) as image:  # reads the header only
                if image.width * image.height > MAX_PIXELS:
                    raise DataError.at("A picture is too large to decode", "image", image.size, f"at most {MAX_PIXELS} pixels")
                return preprocess.preprocess(image, cfg["size"], cfg["resize_mode"], cfg["interpolation"], cfg["fill_color"])
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise DataError.at(
                "A picture cannot be decoded", "image", str(error), "JPEG, PNG, WebP or another format of Pillow's"
            ) from error


def _column(frame: pd.DataFrame, name: str) -> list[Any]:
    """A column with every missing value as None."""
    if name not in frame:
        return [None] * len(frame)
    return [value if isinstance(value, str | bytes) else None for value in frame[name]]


def _one_each(texts: Sequence[str | None], images: Sequence[bytes | None]) -> None:
    from diptych.core.errors import DataError

    for row, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == (image is None):
            raise DataError.at(
                "Every row is a text or a picture", f"row {row}", "neither" if text is None else "both", "one of `text`, `image`"
            )


def _numpy(feature_ND: Any) -> NDArray[np.float32]:
    features: NDArray[np.float32] = feature_ND.float().numpy()
    return features


mlflow.models.set_model(ServedModel())
