"""What each family of language models fixes about the decoder; every size is free."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from navil_megatron.config.language import LanguageConfig


@dataclass(frozen=True, slots=True)
class FamilyTraits:
    """The values of ``LanguageConfig`` that come with a family's name."""

    qk_norm: bool = False
    """RMSNorm over each head's query and key."""
    qkv_bias: bool = False
    """Bias on query, key and value."""
    may_compose_visual_output: bool = False
    """The released code of a NaViL of this family applies the visual output projection after the text one."""

    @property
    def fixed(self) -> dict[str, bool]:
        """Settings of ``model.language`` that have one value in the family."""
        return {name: value for name, value in asdict(self).items() if name != "may_compose_visual_output"}


FAMILIES: dict[str, FamilyTraits] = {
    "qwen3": FamilyTraits(qk_norm=True),
    "qwen2": FamilyTraits(qkv_bias=True),
    "llama": FamilyTraits(),
    "internlm2": FamilyTraits(may_compose_visual_output=True),
}
"""By ``model.language.family``."""


def family_rules(language: LanguageConfig) -> Iterator[str]:
    """One line for every setting that the family's published code could not read or would compute otherwise."""
    traits = FAMILIES[language.family]
    for name, expected in traits.fixed.items():
        found = getattr(language, name)
        if found != expected:
            yield (
                f"model.language.{name} is {str(found).lower()}, but models of the {language.family} family have "
                f"{str(expected).lower()}; change it or model.language.family"
            )
    if language.composed_visual_output_projection and not traits.may_compose_visual_output:
        known = ", ".join(name for name, other in FAMILIES.items() if other.may_compose_visual_output)
        yield (
            f"model.language.composed_visual_output_projection is true, but the {language.family} family has no such "
            f"output; set it to false or use family {known}"
        )
