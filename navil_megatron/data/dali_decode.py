"""Decoding by NVIDIA DALI, on the CPU or on the GPU, and resizing by one path of tensor operations for both.

What DALI refuses Pillow decodes, so that a file is bad for both decoders or for none. Dynamic mode gives every thread a
context of its own, which is why several may decode at once.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import compress

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import torch
from PIL import Image

from navil_megatron.blueprint.image_plan import ScalePlan
from navil_megatron.data.image_decode import (
    SIZE_DIFFERS,
    Decoded,
    DecodeJob,
    ImageDecodeError,
    open_promised,
    patchify,
    upright,
)

_ONLY_PILLOW = ("GIF", "AVIF")  # formats that would make DALI refuse the whole batch
_started_threads: list[int] = []


def _start_threads(count: int) -> None:
    """Sets DALI's threads, once: an operator that was made for more threads than there are later waits for ever."""
    if not _started_threads:
        ndd.set_num_threads(count)
        _started_threads.append(count)


class DaliDecoder:
    """Within 2/255 of ``PillowDecoder``."""

    def __init__(
        self, patch_size: int, merge_size: int, max_pixels: int, *, device: torch.device, num_threads: int
    ) -> None:
        """Decodes ``max_pixels`` at most at a time; the first decoder's ``num_threads`` hold for the whole process."""
        self.device = device
        self._patch_size, self._merge_size, self._max_pixels = patch_size, merge_size, max_pixels
        self._dali_device = ndd.device(device)
        self._thread = threading.local()
        _start_threads(num_threads)

    def decode(self, jobs: Sequence[DecodeJob]) -> list[Decoded]:
        """See ``ImageDecoder``."""
        results: list[Decoded] = []
        for group in _groups(jobs, self._max_pixels):
            with self._stream_order():
                headers = [self._open(job) for job in group]
                by_dali = [isinstance(h, Image.Image) and h.format not in _ONLY_PILLOW for h in headers]
                pictures = iter(self._by_dali([job.file for job in compress(group, by_dali)]))
                for job, header, is_decoded in zip(group, headers, by_dali, strict=True):
                    results.append(self._finish(job, header, next(pictures) if is_decoded else None))
        return results

    @contextmanager
    def _stream_order(self) -> Iterator[None]:
        """On a GPU, DALI's work and the resizes on one stream of this thread: beside the training, and in order, so
        that DALI takes no memory back that a resize still reads.
        """
        if self.device.type == "cpu":
            yield
            return
        with self._dali_device:
            if not hasattr(self._thread, "stream"):
                self._thread.stream = torch.Stream(device=self.device)
                ndd.set_current_stream(self._thread.stream.native_handle)
            with self._thread.stream:
                yield

    def _open(self, job: DecodeJob) -> Image.Image | ImageDecodeError:
        """The file's header; Pillow reads it in a third of the time that DALI's peek takes."""
        try:
            return open_promised(job, self._max_pixels)
        except ImageDecodeError as error:
            return error

    def _by_dali(self, files: Sequence[bytes]) -> list[torch.Tensor | None]:
        """[height, width, 3] uint8 on the device of each file, None where DALI refuses it."""
        if not files:
            return []
        encoded = ndd.as_batch([np.frombuffer(file, dtype=np.uint8) for file in files])
        try:
            # On the GPU, chroma raised as on the CPU, and threads not pinned to the cores of another rank.
            decoded = ndd.decoders.image(encoded, device=self._dali_device, jpeg_fancy_upsampling=True, affine=False)
            return [picture.torch() for picture in decoded.tensors]
        except RuntimeError:  # of the whole batch, for one bad file in it
            return [None] if len(files) == 1 else [picture for file in files for picture in self._by_dali([file])]

    def _finish(self, job: DecodeJob, header: Image.Image | ImageDecodeError, picture: torch.Tensor | None) -> Decoded:
        """The wanted scales of a picture that DALI decoded, or that Pillow now does."""
        if isinstance(header, ImageDecodeError):
            return header
        if picture is None:
            try:
                picture = torch.from_numpy(np.array(upright(header))).to(self.device)
            except ImageDecodeError as error:
                return error
        if tuple(picture.shape[:2]) != job.size:
            return ImageDecodeError(SIZE_DIFFERS)
        source = picture.permute(2, 0, 1)[None]
        if source.is_cuda:
            source = source.float()  # torch resizes uint8 on the CPU alone
        # To the host: until a step asks for them, patches of rows made ahead would fill the GPU.
        return [
            patchify(resize(source, scale)[0], scale, self._patch_size, self._merge_size).cpu()
            for scale in job.wanted_scales
        ]


def resize(picture: torch.Tensor, scale: ScalePlan) -> torch.Tensor:
    """[1, 3, height, width], uint8 or whole numbers in float32, of a picture brought to one scale.

    A pass along rows and one along columns, each rounded and clipped, in the order that Pillow takes: bicubic
    interpolation overshoots at edges, where another order, or no clipping in between, differs by up to 30 of 255.
    """
    height, width = picture.shape[2:]
    size = (scale.resized_height, scale.resized_width)
    columns_first = height - size[0] > max(0, 2 * (width - size[1]))
    if columns_first:
        picture, size = picture.transpose(2, 3), (size[1], size[0])
    # The kernel for uint8 makes both passes so by itself; the one for float neither rounds nor clips.
    for target in [size] if picture.dtype == torch.uint8 else [(picture.shape[2], size[1]), size]:
        if tuple(picture.shape[2:]) != target:
            picture = torch.nn.functional.interpolate(picture, size=target, mode="bicubic", antialias=True)
            if picture.is_floating_point():
                picture = picture.round_().clamp_(0, 255)
    return picture.transpose(2, 3) if columns_first else picture


def _groups(jobs: Sequence[DecodeJob], max_pixels: int) -> Iterator[list[DecodeJob]]:
    """The jobs in order, in pieces of about one largest picture, so that memory does not grow with their number."""
    group: list[DecodeJob] = []
    pixels = 0
    for job in jobs:
        area = job.size[0] * job.size[1]
        if group and pixels + area > max_pixels:
            yield group
            group, pixels = [], 0
        group.append(job)
        pixels += area
    if group:
        yield group
