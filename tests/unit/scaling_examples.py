"""Studies with known laws, as files and as objects."""

import json
import math
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import numpy as np

from navil_megatron.scaling.study import Run, Study

Loss = Callable[[float, float, float], float]
LLMS = (0.5e9, 1.8e9, 7e9)


def saturating(exponent: float = 0.5, prefactor: float = 0.4) -> Loss:
    """A loss that falls with the log of the encoder up to ``prefactor * llm ** exponent`` (billions), and then not."""

    def loss(llm: float, encoder: float, _: float) -> float:
        best = prefactor * 1e9 * (llm / 1e9) ** exponent
        return 1 + 0.03 * max(0.0, math.log2(best / encoder))

    return loss


def additive(n: float = 0.3, v: float = 0.4, d: float = 0.5, rest: float = 0.6) -> Loss:
    """``rest + 0.3 N^-n + 0.05 V^-v + 2 D^-d``, in billions and millions."""

    def loss(llm: float, encoder: float, data: float) -> float:
        sizes = llm / 1e9, encoder / 1e9, data / 1e6
        return rest + 0.3 * sizes[0] ** -n + 0.05 * sizes[1] ** -v + 2 * sizes[2] ** -d

    return loss


def make_study(
    loss: Loss,
    llms: Iterable[float] = LLMS,
    encoders: Iterable[float] = tuple(75e6 * 2**i for i in range(6)),
    data: Iterable[float] = (120e6,),
    noise: float = 0.0,
    seeds: int = 1,
    draw: int = 0,
) -> Study:
    """Every combination, with relative Gaussian noise."""
    generator = np.random.default_rng(draw)
    runs = [
        Run(
            llm=n,
            encoder=v,
            data=d,
            loss=loss(n, v, d) * (1 + noise * float(generator.standard_normal())),
            where=f"study:{index + 1}",
            seed=seed,
        )
        for index, (n, v, d, seed) in enumerate(product(llms, encoders, data, range(seeds)))
    ]
    return Study(name="study", runs=tuple(runs))


def write_lines(study: Study, path: Path, order: int = 1) -> Path:
    """The study as JSON lines; ``order`` -1 turns them round."""
    lines = [
        json.dumps(
            {
                "llm_parameters": run.llm,
                "encoder_parameters": run.encoder,
                "samples": run.data,
                "validation_loss": run.loss,
                "seed": run.seed,
            }
        )
        for run in study.runs[::order]
    ]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path
