"""How fast one training step is, as ratios against named peers taken in the same run (forward and backward, CPU).

    python tools/bench/step.py [--json] [--precision fp32|bf16] [--rounds N]

- ``ratio_vs_reference``: the language model with the visual features given, against the exported folder's plain torch
  model, written the authors' way: text projections on all tokens and visual ones again on visual tokens, masked writes,
  LM head on every position. Same weights, same batch, 80% visual tokens.
- ``ratio_vs_reference_whole``: the same with the visual encoder.
- ``ratio_vs_qwen3_text``: text alone, against transformers' own Qwen3 of the same size.
- ``ratio_tp2``: two ranks, tensor and sequence parallel, one thread each, against one process with two threads.

Ratios are of tokens per second, medians over rounds in which both sides take turns; above 1 we are faster.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing
from transformers import Qwen3Config, Qwen3ForCausalLM

import navil_megatron.runtime  # noqa: F401  quiets core's import-time warnings
from navil_megatron.config.run import NaViLConfig
from navil_megatron.hf.hf_config import hf_config_from_model
from navil_megatron.hf.jobs import export_jobs
from navil_megatron.hf.remote_code.configuration_navil_chat import NaViLChatConfig
from navil_megatron.hf.remote_code.modeling_navil_chat import NaViL
from navil_megatron.models.build import build_model
from navil_megatron.models.navil_model import NaViLModel
from navil_megatron.models.vision_encoder import normalise
from navil_megatron.runtime.session import Session
from navil_megatron.training.batch import build_model_inputs, place_of

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
from small_run import mixed_row, one_sample_row, small_config, start_rank


def bench_config(options: argparse.Namespace, tensor_parallel: int, threads: int) -> NaViLConfig:
    """The shape that the ratios are asked for: h 512, f 1536, a vocabulary of 16k."""
    return small_config(
        layers=options.layers,
        tokens=options.tokens,
        precision=options.precision,
        threads=threads,
        parallel={"tensor_model_parallel_size": tensor_parallel, "sequence_parallel": tensor_parallel > 1},
    )


def whole_tensors(model: NaViLModel) -> dict[str, torch.Tensor]:
    """The weights of one rank as a checkpoint would hold them: layers stacked, under checkpoint keys."""
    stacked: dict[str, dict[int, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        number = next((part for part in parts if part.isdigit()), None)
        key = ".".join(part for part in parts if part != number)
        stacked.setdefault(key, {})[-1 if number is None else int(number)] = parameter.detach()
    return {key: layers[-1] if -1 in layers else torch.stack([layers[n] for n in sorted(layers)])
            for key, layers in stacked.items()}  # fmt: skip


def reference_model(model: NaViLModel, config: NaViLConfig) -> NaViL:
    """The plain torch model of an exported folder, with our weights."""
    dtype = next(model.parameters()).dtype
    json_config = hf_config_from_model(
        config.model, dtype=str(dtype).removeprefix("torch."), token_ids={}, image_settings={}
    )
    reference = NaViL(NaViLChatConfig(**json_config)).to(dtype)
    weights, exported = whole_tensors(model), {}
    for job in export_jobs(config.model):
        (slot,) = job.sources
        tensor = weights[slot.key] if slot.layer is None else weights[slot.key][slot.layer]
        exported |= zip((target.key for target in job.targets), job.function((tensor,)), strict=True)
    missing, unexpected = reference.load_state_dict(exported, strict=False)
    if missing or unexpected:
        raise SystemExit(f"the reference model does not take our weights: {missing} {unexpected}")
    return reference.train()


def steps_of_both(
    config: NaViLConfig, session: Session, features_given: bool
) -> tuple[Callable[[], float], Callable[[], float]]:
    """One step of ours and one of the reference, each giving its loss. Same weights, same row."""
    (model,) = build_model(config, session.groups, session.device)
    reference = reference_model(model, config)
    microbatch = mixed_row(config)
    inputs = build_model_inputs(microbatch)
    labels = torch.full((1, microbatch.input_ids.size), -100)
    labels[0, 1:] = torch.from_numpy(microbatch.labels[:-1])
    row = {
        "input_ids": torch.from_numpy(microbatch.input_ids)[None],
        "pixel_values": normalise(microbatch.pixel_values),
        "image_grid_thw": torch.from_numpy(microbatch.image_grid_thw),
        "labels": labels,
    }
    if features_given:
        features = model.encode_images(inputs.first_stage).detach().requires_grad_()
        model.encode_images = lambda first_stage: features
        reference.extract_feature = lambda pixel_values, image_grid_thw: features
        row["pixel_values"] = torch.empty(0)

    def ours() -> float:
        model.zero_grad()
        loss = model(inputs).mean()
        loss.backward()
        return loss.item()

    def theirs() -> float:
        reference.zero_grad()
        loss = reference(**row, use_cache=False).loss
        loss.backward()
        return loss.item()

    return ours, theirs


def steps_of_text(config: NaViLConfig, session: Session) -> tuple[Callable[[], float], Callable[[], float]]:
    """One text-only step of ours and of transformers' Qwen3; every position is predicted in both."""
    language = config.model.language
    (model,) = build_model(config, session.groups, session.device)
    dtype = next(model.parameters()).dtype
    qwen3 = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=language.vocab_size,
            hidden_size=language.hidden_size,
            intermediate_size=language.ffn_hidden_size,
            num_hidden_layers=language.num_layers,
            num_attention_heads=language.num_attention_heads,
            num_key_value_heads=language.num_query_groups,
            head_dim=language.head_dim,
            tie_word_embeddings=False,
        )
    ).to(dtype)
    microbatch = one_sample_row(config, 1, config.data.seq_length, [])
    inputs = build_model_inputs(microbatch)
    input_ids = torch.from_numpy(microbatch.input_ids)[None]

    def ours() -> float:
        model.zero_grad()
        loss = model(inputs).mean()
        loss.backward()
        return loss.item()

    def theirs() -> float:
        qwen3.zero_grad()
        loss = qwen3(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        return loss.item()

    return ours, theirs


def ratio(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> dict[str, float]:
    """Seconds of theirs over seconds of ours: median, smallest and largest over the rounds."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(rounds + 1):
        for name, step in (("ours", ours), ("theirs", theirs)):
            started = time.perf_counter()
            step()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return {
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "ours_seconds": statistics.median(seconds["ours"]),
        "theirs_seconds": statistics.median(seconds["theirs"]),
    }


def single_process(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The three ratios of one process, and the losses' agreement."""
    config = bench_config(options, 1, options.threads)
    found = {}
    with Session.start(config) as session:
        for name, features_given in (("ratio_vs_reference", True), ("ratio_vs_reference_whole", False)):
            ours, theirs = steps_of_both(config, session, features_given)
            if abs(ours() - theirs()) > (1e-3 if options.precision == "fp32" else 0.2):
                raise SystemExit(f"{name}: the two models do not compute the same loss: {ours()} and {theirs()}")
            found[name] = ratio(ours, theirs, options.rounds)
        found["ratio_vs_qwen3_text"] = ratio(*steps_of_text(config, session), options.rounds)
    return found


def time_rank(rank: int, world_size: int, options: argparse.Namespace, folder: str) -> None:
    """Median step seconds of one layout, written by rank 0."""
    config = bench_config(options, world_size, 1 if world_size > 1 else 2)
    with start_rank(config, rank, world_size, Path(folder) / f"rendezvous-{world_size}") as session:
        (model,) = build_model(config, session.groups, session.device)
        inputs = build_model_inputs(mixed_row(config, place=place_of(session)))
        seconds = []
        for _ in range(options.rounds + 1):
            torch.distributed.barrier()
            started = time.perf_counter()
            model.zero_grad()
            model(inputs).mean().backward()
            torch.distributed.barrier()
            seconds.append(time.perf_counter() - started)
        if rank == 0:
            (Path(folder) / f"seconds-{world_size}").write_text(json.dumps(seconds[1:]))


def tensor_parallel_ratio(options: argparse.Namespace) -> dict[str, float]:
    """One process with two threads against two ranks with one each."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for world_size in (1, 2):
            torch.multiprocessing.spawn(time_rank, (world_size, options, folder), nprocs=world_size)
            seconds[world_size] = json.loads((Path(folder) / f"seconds-{world_size}").read_text())
    one, two = statistics.median(seconds[1]), statistics.median(seconds[2])
    return {"median": one / two, "ours_seconds": two, "theirs_seconds": one,
            "min": min(seconds[1]) / max(seconds[2]), "max": max(seconds[1]) / min(seconds[2])}  # fmt: skip


def main() -> int:
    """Prints a table, or one JSON object last on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the row")
    parser.add_argument("--layers", type=int, default=4, help="layers of decoder and encoder")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads of the single process")
    options = parser.parse_args()
    details = single_process(options)
    details["ratio_tp2"] = tensor_parallel_ratio(options)
    for name, figures in details.items():
        print(
            f"{name:26} {figures['median']:.2f}x  ({figures['min']:.2f} to {figures['max']:.2f})  "
            f"ours {figures['ours_seconds']:.3f} s, peer {figures['theirs_seconds']:.3f} s"
        )
    if options.json:
        medians = {name: figures["median"] for name, figures in details.items()}
        print(json.dumps({**medians, "details": details, "options": vars(options), "torch": torch.__version__}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
