"""TOML files and overrides that nobody wrote."""

import random
from pathlib import Path

import pytest

from navil_megatron.config.errors import ConfigError
from navil_megatron.config.load import load_config
from navil_megatron.config.validate import validate
from tests.fuzz.inputs import fuzz
from tests.unit.config_examples import EXAMPLE_TOML
from tests.unit.test_hf_fuzz import mutate

SETTINGS = (
    "optimizer.lr",
    "data.train_sources",
    "model.vision",
    "training.train_steps",
    "model.special_token_ids",
    "x",
)
INNER = ("1", '"x"', "9" * 5000, "0x" + "f" * 6000, "1e999", "nan", "1979-13-45", "none", "\x00", "'")


def nested(draw: random.Random) -> str:
    """A value of some depth, closed or not."""
    depth = draw.choice((1, 5, 90, 400, 3000))
    start, end = draw.choice((("[", "]"), ("{a=", "}"), ("[{a=", "}]")))
    return start * depth + draw.choice(INNER) + end * draw.choice((depth, depth, depth - 1, 0))


def test_configs(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"

    def read(draw: random.Random) -> None:
        content, overrides = EXAMPLE_TOML.encode(), []
        if (kind := draw.randrange(4)) == 0:
            overrides = [f"{draw.choice(SETTINGS)}={nested(draw)}"]
        elif kind == 1:
            content = f"{draw.choice(SETTINGS)} = {nested(draw)}\n".encode() + content
        else:
            content = mutate(content, [(0, len(content))], draw)
        path.write_bytes(content)
        validate(load_config(path, overrides))

    outcomes = fuzz("configs", read)
    assert min(outcomes["works"], outcomes["refused"]) > 0


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("x = " + "[" * 2000, "not valid TOML: values are nested too deeply"),
        ("x = " + "9" * 5000, "not valid TOML: Exceeds the limit"),
        ("optimizer.lr = " + "9" * 400, "optimizer.lr: found 999.*, expected a number"),
        ("optimizer.lr = 0x" + "f" * 6000, "optimizer.lr: found a number of too many digits, expected a number"),
        ("optimizer.lr = [{" + "a." * 3000 + "a = 1}]", "optimizer.lr: found a value nested too deeply, expected"),
    ],
    ids=["depth", "digits", "float", "hexadecimal", "dots"],
)
def test_values_of_any_depth_and_length_are_one_line(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match=match):
        load_config(tmp_path / "c.toml")


def test_an_override_of_any_depth_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(EXAMPLE_TOML)
    with pytest.raises(ConfigError, match=r"optimizer.lr: found \"\[\[.*expected a number"):
        load_config(tmp_path / "c.toml", ["optimizer.lr=" + "[" * 2000])
