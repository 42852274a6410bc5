"""Whether a config can run: each number by itself, then the rules that span settings.

``load_config`` checks types and choices. The rules of a section stand beside its fields; one that spans sections
stands in the later of them.
"""

from navil_megatron.config.checkpoint import checkpoint_rules
from navil_megatron.config.data import data_rules
from navil_megatron.config.errors import ConfigError
from navil_megatron.config.evaluation import evaluation_rules
from navil_megatron.config.model import ModelConfig, model_rules
from navil_megatron.config.numbers import out_of_bounds
from navil_megatron.config.optimizer import optimizer_rules
from navil_megatron.config.parallel import parallel_rules
from navil_megatron.config.precision import precision_rules
from navil_megatron.config.run import NaViLConfig
from navil_megatron.config.runtime import runtime_rules
from navil_megatron.config.training import training_rules


def validate(config: NaViLConfig, world_size: int | None = None) -> None:
    """Checks a whole run on so many ranks; ``None`` where that is not known yet: the layout's fit stays unchecked.

    Raises:
        ConfigError: with every broken rule, each saying what was found, what was expected and what to do.
    """
    # The rules divide by these numbers, so they come first and alone.
    problems = list(out_of_bounds(config))
    if not problems:
        model, data, parallel = config.model, config.data, config.parallel
        problems = [
            *model_rules(model),
            *data_rules(data, model),
            *parallel_rules(parallel, model.language, data.seq_length),
            *training_rules(config.training, parallel, world_size),
            *optimizer_rules(config.optimizer, config.training.train_steps),
            *checkpoint_rules(config.checkpoint),
            *evaluation_rules(config.evaluation, config.training),
            *runtime_rules(config.runtime, model.language),
            *precision_rules(config.precision, model, data, parallel, config.runtime),
        ]
    if problems:
        raise ConfigError(problems)


def model_problems(model: ModelConfig) -> list[str]:
    """Every rule that a model section breaks by itself, whatever the run."""
    return list(out_of_bounds(model, "model")) or list(model_rules(model))
