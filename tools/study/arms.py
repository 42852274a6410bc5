"""What each study compares: arms, i.e. models that differ in one thing, and the sizes that a machine can bear.

An arm is named by everything that sets it apart, so studies that share one train it once.
"""

from dataclasses import dataclass, replace
from typing import Literal

PARTS = ("attention", "ffn")
NATIVE_PIXELS = 16_384
"""No scene is larger, so none is shrunk: only then is a second scale smaller by whole tokens."""
HEAD_DIM = 32


@dataclass(frozen=True, slots=True)
class Arm:
    """One model of a study; every seed of it is a run."""

    llm: str
    """Key of ``Scale.llms``."""
    depth: int
    """Layers of the encoder."""
    width: int
    """Width of the encoder."""
    start: Literal["pretrained", "random"] = "pretrained"
    """Where the LLM's weights come from."""
    experts: tuple[str, ...] = PARTS
    """Parts of a decoder layer with weights for each modality."""
    visual_experts: Literal["copy", "random"] = "copy"
    """How these start from a pretrained LLM."""
    multi_scale: bool = True
    """Visual multi-scale packing."""
    max_image_pixels: int | None = None
    """Largest area of an image; None: the config's."""
    length: int = 1
    """Trained for so many times the config's steps."""
    rate: float | None = None
    """Learning rate; None: the config's."""
    head_multiple: int = 4
    """What the channels of a head are a multiple of: 4 for 2D rotary positions, 8 for attention in BF16 on a GPU."""

    @property
    def heads(self) -> int:
        """Attention heads of the encoder, of about 32 channels."""
        fitting = (heads for heads in range(1, self.width + 1) if self.width % (self.head_multiple * heads) == 0)
        return min(fitting, key=lambda heads: abs(self.width / heads - HEAD_DIM))

    @property
    def name(self) -> str:
        """The same for the same model, in whichever study."""
        words = [self.llm, f"{self.depth}x{self.width}"]
        words += ["random-llm"] * (self.start == "random")
        words += ["+".join(self.experts) or "no-experts"] * (self.experts != PARTS)
        words += ["random-experts"] * (self.visual_experts == "random")
        words += ["one-scale"] * (not self.multi_scale)
        words += [f"{self.max_image_pixels}px"] * (self.max_image_pixels is not None)
        words += [f"{self.length}-times-as-long"] * (self.length > 1)
        words += [f"rate-{self.rate}"] * (self.rate is not None)
        return "_".join(words)


@dataclass(frozen=True, slots=True)
class Llm:
    """A decoder, Qwen3-like; heads of 32 channels."""

    layers: int
    width: int

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.width // HEAD_DIM

    @property
    def groups(self) -> int:
        """Key/value heads."""
        return self.heads // 2


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes for one kind of machine; its config has the rest."""

    config: str
    """File beside this one."""
    llms: dict[str, Llm]
    base_llm: str
    encoders: tuple[tuple[int, int], ...]
    """(depth, width), each with about twice the parameters of the one before."""
    base_encoder: tuple[int, int]
    shapes: tuple[tuple[int, int], ...]
    """(depth, width) of equal 12 depth width², ascending in depth."""
    num_emoji: int
    difficulty: int
    num_train: int
    num_heldout: int
    llm_steps: int
    """Updates that pretrain an LLM on captions alone."""
    overrides: tuple[str, ...] = ()
    """Settings over those of the config."""
    head_multiple: int = 4
    """As of ``Arm``."""

    @property
    def base(self) -> Arm:
        """The paper's choice in everything: what the other arms are compared with."""
        return Arm(self.base_llm, *self.base_encoder, head_multiple=self.head_multiple)


SCALES = {
    # Everything once in a minute or two, to see that it works: what it finds means nothing.
    "rehearsal": Scale(
        config="cpu.toml",
        llms={"small": Llm(1, 64), "base": Llm(2, 64), "large": Llm(2, 96)},
        base_llm="base",
        encoders=((1, 20), (1, 32), (1, 56)),
        base_encoder=(1, 32),
        shapes=((1, 32), (4, 16)),
        num_emoji=4,
        difficulty=1,
        num_train=200,
        num_heldout=8,
        llm_steps=2,
        overrides=(
            "training.train_steps=4",
            "evaluation.every_steps=2",
            "training.log_every_steps=1",
            "optimizer.warmup_steps=1",
            "data.seq_length=256",
        ),
    ),
    "cpu": Scale(
        config="cpu.toml",
        llms={"small": Llm(2, 64), "base": Llm(3, 96), "large": Llm(3, 192)},
        base_llm="base",
        encoders=((3, 32), (3, 48), (3, 72), (3, 104)),
        base_encoder=(3, 72),
        shapes=((1, 128), (3, 72), (7, 48), (16, 32)),
        num_emoji=16,
        difficulty=2,
        num_train=12_000,
        num_heldout=300,
        llm_steps=600,
    ),
    "gpu": Scale(
        config="gpu.toml",
        llms={"small": Llm(6, 256), "base": Llm(8, 512), "large": Llm(12, 1024)},
        base_llm="base",
        encoders=((6, 96), (6, 144), (6, 216), (6, 312), (6, 448)),
        base_encoder=(6, 216),
        shapes=((1, 528), (3, 304), (6, 216), (12, 152), (24, 104)),
        num_emoji=48,
        difficulty=4,
        num_train=400_000,
        num_heldout=2_000,
        llm_steps=4_000,
        head_multiple=8,
    ),
}


@dataclass(frozen=True, slots=True)
class Study:
    """One finding of the paper, asked again."""

    title: str
    claim: str
    """What the paper says, with its place there."""
    arms: dict[str, Arm]
    """Label in tables and pictures -> arm."""
    preferred: str
    """Label of the arm that is closest to the paper's models; the others are compared with it."""


def studies(scale: Scale) -> dict[str, Study]:
    """The six studies at a scale."""
    base = scale.base
    # At their own size scenes are twice the tokens, and a model begins to read them later.
    native = replace(base, max_image_pixels=NATIVE_PIXELS, length=2)
    return {
        "a": Study(
            "LLM initialisation",
            "Observation 1 (figure 2): a random LLM needs over 10 times the data of a pretrained one.",
            {"pretrained LLM": base, "random LLM": replace(base, start="random")},
            "pretrained LLM",
        ),
        "b": Study(
            "Modality experts",
            "Observation 2 (figure 3): with modality experts the same loss takes 1/10 of the data. The paper prefers "
            "attention and FFN experts to FFN experts alone, without a table of losses.",
            {
                "attention + FFN": base,
                "FFN only": replace(base, experts=("ffn",)),
                "none": replace(base, experts=()),
            },
            "attention + FFN",
        ),
        "c": Study(
            "Encoder depth against width",
            "Observation 3 (figure 4): at equal parameters very deep and very shallow encoders are worse, everything "
            "between is alike, and shallow ones are ahead early.",
            {f"{d} x {w}": replace(base, depth=d, width=w) for d, w in scale.shapes},
            "{} x {}".format(*scale.base_encoder),
        ),
        "d": Study(
            "Encoder size for several LLM sizes",
            "Observations 4 and 5 (figures 5 to 7): larger LLMs reach a lower loss, larger encoders gain less and "
            "less, and the best encoder grows with the LLM.",
            {
                f"{llm} LLM, {d} x {w}": replace(base, llm=llm, depth=d, width=w)
                for llm in scale.llms
                for d, w in scale.encoders
            },
            "{} LLM, {} x {}".format(scale.base_llm, *scale.base_encoder),
        ),
        "e": Study(
            "Visual multi-scale packing",
            "Section 4.1: it is introduced for inference; tables 7 and 8 train with it too. The paper has no ablation.",
            {
                "on": native,
                "off": replace(native, multi_scale=False),
            },
            "on",
        ),
        "f": Study(
            "Start of the visual experts",
            "Not stated in the paper; copies of the text experts are the natural choice.",
            {"copied": base, "random": replace(base, visual_experts="random")},
            "copied",
        ),
    }
