"""The image decoder that a run asks for."""

import importlib.util

import torch

from navil_megatron.config.errors import UserError
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.image_decode import ImageDecoder, PillowDecoder


def build_image_decoder(config: NaViLConfig) -> ImageDecoder:
    """The decoder of a run; UserError where the config asks for DALI and it is not installed."""
    vision, data = config.model.vision, config.data
    sizes = (vision.patch_size, vision.merge_size, data.max_source_pixels)
    if data.image_decoder == "pillow":
        return PillowDecoder(*sizes)
    if not importlib.util.find_spec("nvidia") or not importlib.util.find_spec("nvidia.dali"):
        raise UserError(
            'data.image_decoder = "dali" needs the package nvidia-dali-cuda130, which is not installed: '
            'pip install "nvidia-dali-cuda130>=2.4,<2.5", or set data.image_decoder = "pillow"'
        )
    from navil_megatron.data.dali_decode import DaliDecoder  # 1 s and 600 MB that a run with Pillow does without

    # Names the current device: a thread of the loader would find itself on device 0.
    device = torch.empty(0, device=config.runtime.device).device
    return DaliDecoder(*sizes, device=device, num_threads=data.num_workers)
