"""A plan as one JSON object and as the text of a terminal."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from navil_megatron.blueprint.parameters import active_parameters, count_by_part
from navil_megatron.blueprint.workload import Workload
from navil_megatron.config.load import config_to_dict
from navil_megatron.config.run import NaViLConfig
from navil_megatron.planner.estimate import MEMORY_KINDS, Estimate, StageMemory
from navil_megatron.planner.hardware import Hardware
from navil_megatron.planner.search import Candidate

Report = dict[str, Any]

_SECONDS = ("step_seconds", "layer_traffic_seconds", "gradient_seconds", "update_seconds")
_FIGURES = ("num_microbatches", *_SECONDS, "tokens_per_second_per_gpu", "mfu")


def as_json(config: NaViLConfig, hardware: Hardware, work: Workload, found: Sequence[Candidate]) -> Report:
    """Everything that the plan found."""
    by_phase = {phase: count_by_part(config.model, phase) for phase in ("s1.1", "s1.2", "s2")}
    return {
        "parameters": {
            "total": sum(by_phase["s2"].values()),
            "active": active_parameters(config.model),
            "trainable": sum(by_phase[config.training.phase].values()),
            "by_part": by_phase["s2"],
            "trainable_by_phase": {phase: sum(parts.values()) for phase, parts in by_phase.items()},
        },
        "gpus": hardware.gpus,
        "microbatch": {
            "text_tokens": work.text_tokens,
            "visual_tokens": work.visual_tokens,
            "patches": work.num_patches,
            "predictions": work.num_predictions,
        },
        "assumptions": list(hardware.assumptions()),
        "layouts": [_layout(candidate, hardware) for candidate in found],
    }


def _layout(candidate: Candidate, hardware: Hardware) -> Report:
    parallel, estimate = candidate.config.parallel, candidate.estimate
    report: Report = {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "virtual_pipeline": parallel.virtual_pipeline_model_parallel_size,
        "pipeline_layers": list(parallel.pipeline_layers) if parallel.pipeline_layers else None,
        "context": parallel.context_parallel_size,
        "expert": parallel.expert_model_parallel_size,
        "expert_tensor": parallel.expert_tensor_size,
        "data": hardware.gpus // parallel.model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "recompute": candidate.config.training.recompute,
        "recompute_modules": list(candidate.config.training.recompute_modules),
        "fits": candidate.fits,
        "reason": candidate.reason,
        "step_seconds": None,
        "bubble": None,
        "memory": None,
    }
    if estimate is not None:
        report |= {name: getattr(estimate, name) for name in _FIGURES}
        report |= {
            "bubble": estimate.schedule.bubble,
            "memory": _memory(estimate.fullest),
            "stages": [_memory(stage) for stage in estimate.stages],
        }
    return report


def _memory(stage: StageMemory) -> Report:
    kinds = {f"{kind}_bytes": round(getattr(stage, kind)) for kind in MEMORY_KINDS}
    return {"stage": stage.stage, "parameters": stage.parameters, **kinds, "peak_bytes": round(stage.peak)}


def as_text(config: NaViLConfig, hardware: Hardware, work: Workload, found: Sequence[Candidate], top: int) -> str:
    """Parameters, assumptions, the best layouts, the best one's memory, and what is out."""
    fitting = [candidate for candidate in found if candidate.fits]
    lines = [*parameter_lines(config), "", *_assumption_lines(config, hardware, work), ""]
    lines += [f"{len(fitting)} of {len(found)} layouts fit {hardware.gpus} GPUs of {hardware.hbm:g} GB; the fastest:"]
    lines += _table(fitting[:top])
    if fitting:
        lines += ["", *_best_lines(fitting[0])]
    large = [candidate for candidate in found if candidate.estimate and not candidate.fits]
    if large:
        lines += ["", f"{len(large)} take too much memory; the nearest:"]
        lines += [f"  {describe_layout(candidate.config)}: {candidate.reason}" for candidate in large[:top]]
    refused = [candidate for candidate in found if candidate.estimate is None]
    if refused:
        lines += ["", f"{len(refused)} are refused by a rule:"]
        counts = Counter(candidate.reason for candidate in refused)
        lines += [f"  {count} x {reason}" for reason, count in counts.items()]
    return "\n".join(lines)


def describe_layout(config: NaViLConfig) -> str:
    """A layout in a few words."""
    parallel = config.parallel
    sizes = {
        "tp": parallel.tensor_model_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "vpp": parallel.virtual_pipeline_model_parallel_size,
        "cp": parallel.context_parallel_size,
        "ep": parallel.expert_model_parallel_size,
        "etp": parallel.expert_tensor_parallel_size,
    }
    words = [f"{axis}{size}" for axis, size in sizes.items() if size and (size > 1 or axis in ("tp", "pp", "etp"))]
    if parallel.sequence_parallel:
        words.append("sp")
    if config.training.recompute != "none":
        parts = "+".join(config.training.recompute_modules)
        words.append(f"recompute={'full' if config.training.recompute == 'full' else parts}")
    return " ".join(words)


def parameter_lines(config: NaViLConfig) -> list[str]:
    """Parameters of each part, all and trained."""
    phase = config.training.phase
    total, trained = count_by_part(config.model), count_by_part(config.model, phase)
    lines = [f"{'parameters':26} {'total':>16} {'trained in ' + phase:>18}"]
    lines += [f"  {part:24} {count:16,} {trained[part]:18,}" for part, count in total.items()]
    lines.append(f"  {'together':24} {sum(total.values()):16,} {sum(trained.values()):18,}")
    if config.model.language.num_experts > 1:
        lines.append(f"  {'of which active':24} {active_parameters(config.model):16,}")
    return lines


def _assumption_lines(config: NaViLConfig, hardware: Hardware, work: Workload) -> list[str]:
    share = work.visual_tokens / work.num_tokens
    row = (
        f"rows: {config.microbatch_tokens:,} tokens a microbatch, {share:.0%} visual, {work.num_patches:,} patches in "
        f"{len(work.grids)} scale-images, {work.num_predictions:,} predictions"
    )
    return ["assumed", *(f"  {line}" for line in (row, *hardware.assumptions()))]


def _table(fitting: Sequence[Candidate]) -> list[str]:
    lines = [f"  {'layout':34} {'dp':>4} {'step':>8} {'tok/s/GPU':>10} {'MFU':>5} {'idle':>5} {'peak':>8}  why"]
    for candidate in fitting:
        estimate = candidate.estimate
        assert estimate is not None
        lines.append(
            f"  {describe_layout(candidate.config):34} {estimate.dp_size:4} {estimate.step_seconds:6.2f} s "
            f"{estimate.tokens_per_second_per_gpu:10,.0f} {estimate.mfu:5.0%} "
            f"{estimate.schedule.bubble:5.0%} {estimate.fullest.peak / 1e9:5.1f} GB  {candidate.reason}"
        )
    return lines


def _best_lines(best: Candidate) -> list[str]:
    estimate, training = best.estimate, best.config.training
    assert estimate is not None
    lines = ["memory of a rank of each stage under the fastest, in GB", *memory_lines(estimate)]
    settings = {f"parallel.{name}": value for name, value in config_to_dict(best.config.parallel).items()}
    settings["training.recompute"] = training.recompute
    if training.recompute == "selective":
        settings["training.recompute_modules"] = list(training.recompute_modules)
    told = (f"  {key}={str(value).lower()}".replace(" ", "") for key, value in settings.items() if value is not None)
    return [*lines, "", "to use it:", *told]


def memory_lines(estimate: Estimate) -> list[str]:
    """Memory of a rank of each stage by kind, in GB."""
    kinds = (*MEMORY_KINDS, "peak")
    lines = ["  stage " + "".join(f"{kind:>12}" for kind in kinds)]
    for stage in estimate.stages:
        lines.append(f"  {stage.stage:5} " + "".join(f"{getattr(stage, kind) / 1e9:12.2f}" for kind in kinds))
    return lines
