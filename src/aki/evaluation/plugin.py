"""What the entry point `lmms_eval.models` gives lmms-eval while it is being imported; the model itself comes later."""

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    return ModelManifest(model_id="aki", chat_class_path="aki.evaluation.lmms.Aki")
