"""The model in MLflow's registry: texts and pictures in, features out. MLflow loads this file as code; nothing is pickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow


class ServedModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A dual encoder behind MLflow's `predict`."""

    def load_context(self, context: Any) -> None:
        """Loads the model directory among the artifacts."""
        from diptych.models import clip

        self.encoder = clip.load(Path(context.artifacts["model"])).eval()

    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> list[list[float]]:
        """Features of a frame with a column `text` or `image` (encoded bytes), a row a row."""
        import io

        import torch
        from PIL import Image

        from diptych.models.preprocess import preprocess

        del context, params
        with torch.inference_mode():
            if "image" in model_input:
                images = [preprocess(Image.open(io.BytesIO(data)), self.encoder.image_size) for data in model_input["image"]]
                image_NCHW = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images])
                features = self.encoder.encode_image(image_NCHW)
            else:
                text_NL = torch.from_numpy(self.encoder.tokenizer.encode_cut(list(model_input["text"])))
                features = self.encoder.encode_text(text_NL)
        result: list[list[float]] = features.tolist()
        return result


mlflow.models.set_model(ServedModel())
