"""A sample with a pixel that is no number, as broken memory or a broken decoder would hand it over."""

import math

from navil_megatron.data.microbatches import MicrobatchBuilder

_decode = MicrobatchBuilder._decode


def poison(number: int | None) -> None:
    """From now on, in this process, the pictures of this sample begin with NaN; ``None``: of no sample."""

    def poisoned(self, pictures, decoder):
        pixels, failures = _decode(self, pictures, decoder)
        first = 0
        for picture in pictures:
            if picture.shown.number == number:
                pixels = pixels.float()
                pixels[first, 0] = math.nan
            first += sum(scale.num_patches for scale in picture.job.wanted_scales)
        return pixels, failures

    MicrobatchBuilder._decode = _decode if number is None else poisoned  # type: ignore[method-assign]
