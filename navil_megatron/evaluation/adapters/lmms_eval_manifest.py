"""What lmms-eval finds under its entry points once both packages are installed: ``--model navil``."""

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """The name of the model and where its class is."""
    return ModelManifest("navil", chat_class_path="navil_megatron.evaluation.adapters.lmms_eval_model.NaViL")
