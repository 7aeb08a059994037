"""Tasks by their name in `config.task.name`. A new one is a module with a Task, and a line here."""

from collections.abc import Callable

from mixln_jax import config as configs
from mixln_jax.models.network import Network
from mixln_jax.system.errors import UsageError
from mixln_jax.tasks.instructions import Instructions
from mixln_jax.tasks.language import Language, OfficialLanguage
from mixln_jax.tasks.masked_language import MaskedLanguage
from mixln_jax.tasks.question_answering import QuestionAnswering
from mixln_jax.tasks.task import Task


def _language(config: configs.Config, model: Network) -> Task:
    if not model.causal:
        raise UsageError(
            f'config.model.family={config.model.family} attends to both sides, so it would see the token that it has '
            'to predict: use config.task.name=masked_language'
        )
    kind = Language if config.compat == 'none' else OfficialLanguage
    return kind(model, config.data.mode, config.seq_length)


def _masked_language(config: configs.Config, model: Network) -> Task:
    if model.causal:
        raise UsageError(
            f'config.task.name=masked_language needs a network that sees both sides, such as '
            f'config.model.family=bert, not {config.model.family}'
        )
    if config.compat != 'none':
        raise UsageError(
            f'config.compat={config.compat} has no meaning for config.task.name=masked_language: leave it at none'
        )
    size, mask_id = config.model.vocab_size, config.task.mask_id
    if mask_id >= size:
        raise UsageError(f'config.task.mask_id={mask_id} is not below config.model.vocab_size={size}')
    return MaskedLanguage(model, config.data.mode, config.seq_length, config.task.mask_rate, mask_id)


def _instructions(config: configs.Config, model: Network) -> Task:
    if not model.causal:
        raise UsageError(
            f'config.task.name=instructions needs a network that predicts the next token, such as '
            f'config.model.family=llama, not {config.model.family}'
        )
    if config.compat != 'none':
        raise UsageError(
            f'config.compat={config.compat} has no meaning for config.task.name=instructions: leave it at none'
        )
    return Instructions(model, config.data.mode, config.seq_length)


TASKS: dict[str, Callable[[configs.Config, Network], Task]] = {
    'language': _language,
    'masked_language': _masked_language,
    'instructions': _instructions,
}


def from_config(config: configs.Config, model: Network) -> Task:
    """Returns the task of a run. Raises UsageError, naming the keys, where the network cannot learn it."""
    return TASKS[config.task.name](config, model)


def of_network(model: Network) -> Task:
    """Returns the task by which a network without a run is measured: language modelling, or question answering."""
    return Language(model) if model.causal else QuestionAnswering(model)
