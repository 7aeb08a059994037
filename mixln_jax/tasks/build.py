"""Tasks by their name in `config.task.name`. A new one is a module with a Task, and a line here."""

from mixln_jax import config as configs
from mixln_jax.models.network import Network
from mixln_jax.system.errors import UsageError
from mixln_jax.tasks.classification import Classification
from mixln_jax.tasks.instructions import Instructions
from mixln_jax.tasks.language import Language
from mixln_jax.tasks.masked_language import MaskedLanguage
from mixln_jax.tasks.online import Online
from mixln_jax.tasks.preference import Preference
from mixln_jax.tasks.question_answering import QuestionAnswering
from mixln_jax.tasks.reward import Reward
from mixln_jax.tasks.task import Task

TASKS: dict[str, type[Task]] = {
    'language': Language,
    'masked_language': MaskedLanguage,
    'instructions': Instructions,
    'preference': Preference,
    'reward': Reward,
    'online': Online,
    'classification': Classification,
}


def from_config(config: configs.Config, model: Network) -> Task:
    """Returns the task of a run. Raises UsageError, naming the keys, where the network cannot learn it."""
    task = TASKS[config.task.name]
    if task.reads != model.reads:
        raise UsageError(
            f'config.task.name={config.task.name} needs a network that reads {task.reads}, '
            f'config.model.family={config.model.family} reads {model.reads}'
        )
    return task.from_config(config, model)


def of_network(model: Network) -> Task:
    """Returns the task by which a network without a run is measured: language modelling, question answering, or the
    classification of images.

    Raises UsageError for a network with a head of another kind.
    """
    if model.num_outputs:
        raise UsageError(f'the network {model.obstacle}: only its run, on its own data, says what to measure')
    if model.reads == Classification.reads:
        return Classification(model)
    return Language(model) if model.causal else QuestionAnswering(model)
