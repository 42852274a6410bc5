"""How fast samples become microbatches, from tar files to normalised patches, as ratios against peers in the same run.

    python tools/bench/loader.py [--json] [--samples N] [--rounds R] [--tokens T]

Photo-like JPEGs of 0.3, 1 and 4 MP with captions, on a CPU with 2 workers each; everyone makes the same patches of all
scales and packs rows of the same length.

- ``ratio_vs_pillow``: against Pillow and numpy written plainly, in two worker processes of torch's DataLoader.
- ``ratio_vs_energon``: against megatron-energon over the same tars, with its own decoding to uint8 tensors, its
  packing, and torch's resize.

Ratios are of samples per second, medians over rounds in which all take turns; above 1 we are faster. Where there is a
GPU: images per second and CPU seconds of decoding there, and the time of a step fed by the loader and from memory.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.energon import (
    CaptioningSample,
    DefaultTaskEncoder,
    SampleDecoder,
    WorkerConfig,
    get_loader,
    get_train_dataset,
    stateless,
)
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
from photos import photo, photo_shards
from small_run import small_config

from navil_megatron.blueprint.image_plan import ImagePlanner, ScalePlan, image_token_ids, visual_tokens
from navil_megatron.config.data import SourceConfig
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.choose_decoder import build_image_decoder
from navil_megatron.data.image_decode import DecodeJob
from navil_megatron.data.loader import TrainLoader
from navil_megatron.data.tokenizer import SampleTokenizer, load_tokenizer
from navil_megatron.data.types import ALONE
from navil_megatron.models.build import build_model
from navil_megatron.runtime.session import Session
from navil_megatron.training.batch import build_model_inputs

WORKERS = 2
WARM_ROWS = 8
"""Rows before the clock starts, more than anyone prepares ahead."""
Row = dict[str, Any]
"""The arrays of one row, and ``num_samples``."""


def run_config(index: Path, tokenizer: SampleTokenizer, options: argparse.Namespace, device: str) -> NaViLConfig:
    """A run over the shards."""
    config = small_config(layers=2, tokens=options.tokens, precision="fp32", runtime={"device": device})
    language = replace(config.model.language, vocab_size=tokenizer.vocab_size)
    model = replace(config.model, special_token_ids=tokenizer.special_token_ids, language=language)
    data = replace(
        config.data,
        train_sources=(SourceConfig(index=str(index)),),
        tokenizer=str(index.parent.parent / "tokenizer"),
        image_decoder="dali",
        num_workers=WORKERS,
    )
    return replace(config, model=model, data=data)


class Peer:
    """What both peers do after decoding: tokens, patches and rows as numpy would have them."""

    def __init__(self, config: NaViLConfig) -> None:
        self.planner = ImagePlanner.from_config(config.data, config.model.vision)
        self.seq_length = config.data.seq_length
        self.ids = config.model.special_token_ids
        self.folder = config.data.tokenizer
        self.tokenizer: SampleTokenizer | None = None

    def plan(self, height: int, width: int) -> tuple[ScalePlan, ...]:
        """The scales of a picture."""
        (scales,) = self.planner.plan_images([(height, width)])
        return scales

    def tokens(self, scales: tuple[ScalePlan, ...], caption: str) -> np.ndarray:
        """[n] the sample's ids: its image, then its caption."""
        self.tokenizer = self.tokenizer or load_tokenizer(self.folder)
        image = image_token_ids(scales, self.planner.merge_size, self.ids)
        return np.concatenate([image, self.tokenizer.encode(caption), [self.tokenizer.end_id]])

    def patches(self, picture: np.ndarray, scale: ScalePlan) -> np.ndarray:
        """[patches, 768] uint8 of a resized picture [height, width, 3], padded."""
        canvas = np.zeros((scale.grid_height * 16, scale.grid_width * 16, 3), dtype=np.uint8)
        canvas[: scale.resized_height, : scale.resized_width] = picture
        blocks = canvas.reshape(scale.grid_height // 2, 2, 16, scale.grid_width // 2, 2, 16, 3)
        return blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 768)

    def row(self, samples: list[tuple[np.ndarray, np.ndarray]]) -> Row:
        """The arrays of one row."""
        lengths = [len(ids) for ids, _ in samples]
        padding = self.seq_length - sum(lengths)
        input_ids = np.concatenate([ids for ids, _ in samples] + [np.zeros(padding, dtype=np.int64)])
        visual = visual_tokens(input_ids, self.ids)
        labels = np.where(np.roll(visual, -1), -100, np.roll(input_ids, -1))
        return {
            "input_ids": torch.from_numpy(input_ids),
            "position_ids": torch.cat([torch.arange(length) for length in [*lengths, padding]]),
            "labels": torch.from_numpy(labels),
            "loss_weights": torch.from_numpy((labels != -100).astype(np.float32)),
            "visual_token_mask": torch.from_numpy(visual),
            "pixel_values": torch.from_numpy(np.concatenate([patches for _, patches in samples])),
            "num_samples": len(samples),
        }


class PillowRows(torch.utils.data.IterableDataset):
    """Rows without end, as one would write them in an afternoon."""

    def __init__(self, shards: list[Path], peer: Peer) -> None:
        self.shards, self.peer = shards, peer

    def __iter__(self) -> Iterator[Row]:
        worker = torch.utils.data.get_worker_info()
        row: list[tuple[np.ndarray, np.ndarray]] = []
        for shard in cycle(self.shards[worker.id :: worker.num_workers]):
            for sample in self.read(shard):
                if sum(len(ids) for ids, _ in row) + len(sample[0]) > self.peer.seq_length:
                    yield self.peer.row(row)
                    row = []
                row.append(sample)

    def read(self, shard: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and patches of each sample of a tar."""
        files: dict[str, dict[str, bytes]] = {}
        with tarfile.open(shard) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                files.setdefault(key, {})[extension] = tar.extractfile(member).read()
                if len(files[key]) == 2:
                    found = files.pop(key)
                    image = Image.open(io.BytesIO(found["jpg"])).convert("RGB")
                    scales = self.peer.plan(image.height, image.width)
                    sizes = [(scale.resized_width, scale.resized_height) for scale in scales]
                    resized = [np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for size in sizes]
                    patches = [self.peer.patches(*pair) for pair in zip(resized, scales, strict=True)]
                    yield self.peer.tokens(scales, found["txt"].decode()), np.concatenate(patches)


class EnergonRows(DefaultTaskEncoder):
    """The same in energon's terms."""

    decoder = SampleDecoder(image_decode="torchrgb8")

    def __init__(self, peer: Peer) -> None:
        super().__init__()
        self.peer = peer

    @stateless
    def encode_sample(self, sample: CaptioningSample) -> tuple[np.ndarray, np.ndarray]:
        """Ids and patches."""
        scales = self.peer.plan(*sample.image.shape[1:])
        patches = []
        for scale in scales:
            size = (scale.resized_height, scale.resized_width)
            resized = torch.nn.functional.interpolate(sample.image[None], size=size, mode="bicubic", antialias=True)
            patches.append(self.peer.patches(resized[0].permute(1, 2, 0).numpy(), scale))
        return self.peer.tokens(scales, sample.caption), np.concatenate(patches)

    def select_samples_to_pack(self, samples: list[Any]) -> list[list[Any]]:
        """One row after another, as they come."""
        rows: list[list[Any]] = [[]]
        for sample in samples:
            if sum(len(ids) for ids, _ in rows[-1]) + len(sample[0]) > self.peer.seq_length:
                rows.append([])
            rows[-1].append(sample)
        return rows

    @stateless
    def pack_selected_samples(self, samples: list[Any]) -> Any:
        """The arrays of one row."""
        return self.peer.row(samples)


def ours(config: NaViLConfig) -> Iterator[Row]:
    """Rows of the loader of a run."""
    with closing(TrainLoader(config, ALONE)) as loader:
        for step in loader:
            for microbatch in step.microbatches:
                names = ("input_ids", "position_ids", "labels", "loss_weights", "visual_token_mask", "pixel_values")
                yield {name: getattr(microbatch, name) for name in names} | {"num_samples": len(microbatch.samples)}


def by_pillow(config: NaViLConfig, folder: Path) -> Iterator[Row]:
    """Rows of the plain loader."""
    rows = PillowRows(sorted(folder.glob("*.tar")), Peer(config))
    yield from torch.utils.data.DataLoader(rows, batch_size=None, num_workers=WORKERS)


def by_energon(config: NaViLConfig, folder: Path) -> Iterator[Row]:
    """Rows of energon."""
    dataset = get_train_dataset(
        folder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=WORKERS),
        batch_size=None,
        packing_buffer_size=32,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=EnergonRows(Peer(config)),
    )
    yield from get_loader(dataset)


def prepare_energon(folder: Path) -> None:
    """What energon wants beside the tars."""
    fields = '{"image": "jpg", "caption": "txt"}'
    command = ["energon", "prepare", "--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CaptioningSample"]
    program = str(Path(sys.executable).parent / command[0])
    subprocess.run([program, *command[1:], "--field-map", fields, str(folder)], check=True, capture_output=True)


def samples_per_second(rows: Iterator[Row], num_samples: int) -> tuple[float, float]:
    """Samples a second once every buffer is drained, and patches a sample."""
    with closing(rows):
        for _ in islice(rows, WARM_ROWS):
            pass
        started, samples, patches = time.perf_counter(), 0, 0
        while samples < num_samples:
            row = next(rows)
            samples, patches = samples + row["num_samples"], patches + len(row["pixel_values"])
        return samples / (time.perf_counter() - started), patches / samples


def samples_of(row: Row, context_id: int) -> Iterator[tuple[bytes, np.ndarray]]:
    """Ids and patches of each sample of a row."""
    ids, pixels = np.asarray(row["input_ids"]), np.asarray(row["pixel_values"])
    starts = np.append(np.flatnonzero(np.asarray(row["position_ids"]) == 0), len(ids))
    first = 0
    for start, end in pairwise(starts[: row["num_samples"] + 1]):
        count = 4 * int((ids[start:end] == context_id).sum())
        yield ids[start:end].tobytes(), pixels[first : first + count]
        first += count


def largest_differences(
    sides: dict[str, Callable[[], Iterator[Row]]], num_samples: int, context_id: int
) -> dict[str, int]:
    """How far each peer's patches are from ours, in 255ths, over every sample; the ids must be equal.

    Raises:
        SystemExit: a side makes other samples.
    """
    found: dict[str, dict[bytes, np.ndarray]] = {}
    for name, start in sides.items():
        found[name] = {}
        with closing(start()) as rows:
            for row in islice(rows, 20 * num_samples):
                found[name] |= dict(samples_of(row, context_id))
                if len(found[name]) >= num_samples:
                    break
    for name, samples in found.items():
        if samples.keys() != found["ours"].keys():
            raise SystemExit(f"{name} makes {len(samples.keys() ^ found['ours'].keys())} samples that are not ours")
    return {
        name: max(int(np.abs(patches.astype(int) - found["ours"][ids]).max()) for ids, patches in samples.items())
        for name, samples in found.items()
        if name != "ours"
    }


def measure(sides: dict[str, Callable[[], Iterator[Row]]], options: argparse.Namespace) -> dict[str, Any]:
    """Ratios and rates; sides take turns."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    patches: dict[str, float] = {}
    for number in range(options.rounds):
        for name, start in sides.items():
            rate, patches[name] = samples_per_second(start(), options.samples)
            rates[name].append(rate)
            print(f"round {number}: {name:8} {rate:6.1f} samples/s, {patches[name]:.0f} patches a sample", flush=True)
    found: dict[str, Any] = {"patches_per_sample": patches}
    for name, values in rates.items():
        found[f"samples_per_second_{name}"] = statistics.median(values)  # one image a sample: images/s too
        if name != "ours" and "ours" in rates:
            ratios = [a / b for a, b in zip(rates["ours"], values, strict=True)]
            found[f"ratio_vs_{name}"] = statistics.median(ratios)
            found[f"spread_vs_{name}"] = [min(ratios), max(ratios)]
    return found


def decode_on_gpu(config: NaViLConfig, rounds: int) -> dict[str, Any]:
    """Images per second and CPU seconds per image of decoding and resizing on the GPU."""
    decoder, planner = build_image_decoder(config), ImagePlanner.from_config(config.data, config.model.vision)
    random, found = np.random.default_rng(1), {}
    for megapixels in (0.3, 1, 4):
        jobs = []
        for _ in range(32):
            file = photo(megapixels, random)
            with Image.open(io.BytesIO(file)) as image:
                size = (image.height, image.width)
            (scales,) = planner.plan_images([size])
            jobs.append(DecodeJob(file, size, scales, (True,) * len(scales)))
        seconds = []
        for _ in range(rounds + 1):
            started, cpu = time.perf_counter(), time.process_time()
            decoder.decode(jobs)
            torch.accelerator.synchronize()
            seconds.append((time.perf_counter() - started, time.process_time() - cpu))
        wall, cpu = (statistics.median(column) for column in zip(*seconds[1:], strict=True))
        found[f"{megapixels}MP"] = {"images_per_second": len(jobs) / wall, "cpu_seconds_per_image": cpu / len(jobs)}
    return found


def step_on_gpu(config: NaViLConfig, rounds: int) -> float:
    """Seconds of a step (forward and backward) fed by the loader over those of one fed from memory."""
    with Session.start(config) as session, closing(TrainLoader(config, ALONE)) as loader:
        (model,) = build_model(config, session.groups, session.device)
        held = [next(loader).microbatches[0] for _ in range(WARM_ROWS)]

        def step(microbatch: Any) -> None:
            model.zero_grad()
            model(session.platform.upload(build_model_inputs(microbatch))()).mean().backward()

        def seconds(microbatches: Iterable[Any]) -> float:
            torch.accelerator.synchronize()
            started = time.perf_counter()
            for microbatch in microbatches:
                step(microbatch)
            torch.accelerator.synchronize()
            return time.perf_counter() - started

        seconds(held)
        fresh = (data.microbatches[0] for data in loader)
        ratios = [seconds(islice(fresh, WARM_ROWS)) / seconds(held) for _ in range(rounds)]
        return statistics.median(ratios)


def main() -> int:
    """Prints the rounds, and one JSON object last on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--samples", type=int, default=240, help="images that are made, and samples of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a row")
    parser.add_argument("--only", nargs="+", choices=("ours", "pillow", "energon"), help="run some sides alone")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in the peers' worker processes: two workers, two cores
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as folder:
        index, tokenizer, size = photo_shards(Path(folder), options.samples)
        print(f"{options.samples} images of {size / options.samples / 1000:.0f} kB", flush=True)
        prepare_energon(index.parent)
        config = run_config(index, tokenizer, options, "cpu")
        sides: dict[str, Callable[[], Iterator[Row]]] = {
            "ours": lambda: ours(config),
            "pillow": lambda: by_pillow(config, index.parent),
            "energon": lambda: by_energon(config, index.parent),
        }
        chosen = {name: sides[name] for name in options.only or sides}
        context_id = config.model.special_token_id("<IMG_CONTEXT>")
        differences = largest_differences(chosen, options.samples, context_id) if "ours" in chosen else {}
        print(f"same samples; largest difference from ours, in 255ths: {differences}", flush=True)
        found = {"largest_difference_255ths": differences, **measure(chosen, options)}
        if torch.accelerator.is_available():
            on_gpu = run_config(index, tokenizer, options, "cuda")
            found["gpu"] = decode_on_gpu(on_gpu, options.rounds)
            found["gpu_step_ratio"] = step_on_gpu(on_gpu, options.rounds)
    for name, value in found.items():
        print(f"{name:28} {value}")
    if options.json:
        print(json.dumps({**found, "options": vars(options), "torch": torch.__version__}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
