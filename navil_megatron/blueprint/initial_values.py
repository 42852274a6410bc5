"""How a parameter starts where no weights are given (reference: ``_init_weights``), by its name in the checkpoint."""

from navil_megatron.config.model import ModelConfig


def initial_values(name: str, num_dims: int, model: ModelConfig) -> tuple[float, float]:
    """Mean and standard deviation of a parameter's first values; a deviation of 0 is a constant.

    Matrices and embeddings are N(0, std), norms 1, biases 0, and LayerScale its constant.
    """
    leaf = name.rpartition(".")[2]
    if leaf.startswith("layer_scale"):
        return model.vision.layer_scale_init, 0.0
    if leaf == "bias":
        return 0.0, 0.0
    if num_dims == 1:
        return 1.0, 0.0
    visual = name.startswith(("vision_encoder.", "connector."))
    return 0.0, model.vision.init_std if visual else model.language.init_std
