"""Trained weights as a model of the lm-evaluation-harness (Gao et al. 2024), and its tasks run on them.

The only room that imports `lm_eval`, which nothing else here needs: `pip install lm_eval`.
"""

import functools
import importlib.metadata
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import lm_eval
import numpy as np
import optax
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_table
from tqdm import tqdm

from mixln_jax import config as configs
from mixln_jax.data import tokenizers
from mixln_jax.distributed import mesh as meshes
from mixln_jax.kernels import cross_entropy
from mixln_jax.runs.weights import Weights, open_tokenizer
from mixln_jax.system import console, errors
from mixln_jax.system.errors import DataError, NumericsError, UsageError, first_line

GREEDY = 'do_sample', 'temperature'  # keys of a task's generation that are nothing where they are 0
SHORTEST = 32  # positions; padding to fewer would save nothing


class Harness(TemplateLM):
    """A network of ours on all devices, rows of a batch shared among them.

    A text begins as a document did in training: behind an eos in rows of mode concat, else with its own first token;
    with the weights of a Hugging Face folder behind a bos, once, where its tokenizer puts one. Where there is no
    context (an empty one, the first token of a rolling likelihood) an eos stands for it, of such a folder the bos.

    A rolling likelihood is that of the text alone, after one such token. The harness's own `hf` model puts its token
    before the bos that a tokenizer has put already, and counts that bos as text (lm-evaluation-harness issue 3333).

    A text longer than the window (config.seq_length, max_position_embeddings) loses its beginning. A continuation
    that is longer by itself is scored in several windows, as in `loglikelihood_rolling`.
    """

    eot_token_id = prefix_token_id = None  # known once there is a tokenizer; properties in the harness's own class
    max_gen_toks = 256  # where a task does not say; the harness's own default

    def __init__(self, weights: Weights, batch_size=32, max_length=None, mesh=None):
        """Places the weights.

        Args:
            weights: from `weights.load`.
            batch_size: rows at a time, rounded up to what the devices share evenly.
            max_length: the window; None: what the weights were trained for.
            mesh: from `mesh.make_mesh`; None: all devices along `data`.

        Raises UsageError for a network that sees both sides, such as a BERT, a folder without a tokenizer, or one with
        more ids than the network; DataError for an unreadable one.
        """
        super().__init__()
        self._where = weights.where
        if not weights.model.causal:
            raise UsageError(f'{self._where} sees both sides of a token, so it does not predict the next one')
        if weights.config and weights.tokenizer:
            self._tokenizer: tokenizers.Tokenizer = weights.tokenizer
            self.prefix_token_id = self._tokenizer.eos_id
            self._start = [self._tokenizer.eos_id] if weights.config.data.mode == 'concat' else []
        else:
            self._tokenizer, self._start = open_tokenizer(pathlib.Path(self._where))
            self.prefix_token_id = self._tokenizer.bos_id
        self.eot_token_id, self.max_length = self._tokenizer.eos_id, max_length or weights.max_length
        vocab_size = weights.model.config.vocab_size
        tokenizers.check_fits(self._tokenizer, vocab_size, f'the {vocab_size} of the network {self._where}')
        mesh = mesh or meshes.make_mesh(configs.Mesh(), meshes.devices('auto'))
        parts = meshes.row_parts(mesh)
        self.batch_size = -(-batch_size // parts) * parts
        self._lengths = [self.max_length]  # few, as each is compiled for
        while self._lengths[0] > SHORTEST:
            self._lengths.insert(0, -(-self._lengths[0] // 2))
        self._sharding = meshes.batch_sharding(mesh)
        self.layer_mask = None  # [L] bool: a layer that is False is the identity; None: all layers run
        self._params = jax.device_put(weights.params, meshes.state_shardings(mesh, weights.params))
        model = weights.model.clone(stream_sharding=self._sharding)
        stretch = max(1, cross_entropy.CHUNK * parts // self.batch_size)
        self._predict = jax.jit(functools.partial(_predictions, model=model, stretch=stretch))

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        """The ids of a text, a list, behind the token that begins one; `add_special_tokens=False`: without it."""
        del kwargs
        start = [] if add_special_tokens is False else self._start
        return start + self._tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        del kwargs
        rows, of_request, cut = [], [], 0
        for number, (texts, context, continuation) in enumerate(requests):
            if not continuation:
                raise UsageError(f'the continuation of {texts} has no token of its own')
            cut += texts is not None and len(context + continuation) > self.max_length + 1
            for row, scored in self._windows(context, continuation):
                rows.append(row)
                of_request.append((number, scored))
        if cut:
            what = f'{cut:,} of {len(requests):,} texts are longer than the window of {self.max_length} tokens'
            console.say(f'mixln_jax: warning: {what} and lose their beginning', file=sys.stderr)
        totals, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
        made = self._each(rows, 'loglikelihood', disable_tqdm)
        for (number, scored), row, (log_probs, best) in zip(of_request, rows, made, strict=True):
            totals[number] += log_probs[-scored:].sum(dtype=np.float64)
            greedy[number] &= np.array_equal(best[-scored:], row[-scored:])
        if not np.isfinite(totals).all():
            raise NumericsError(f'{self._where}: a log-likelihood is not finite')
        return list(zip(totals.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Sums over all tokens of each text, windows side by side; a text's first token is predicted from one alone."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        wanted = [(None, [self.prefix_token_id], ids) for ids in texts if ids]
        sums = iter(self._loglikelihood_tokens(wanted, disable_tqdm=disable_tqdm))
        return [next(sums)[0] if ids else 0.0 for ids in texts]

    def generate_until(self, requests, disable_tqdm=False):
        """The likeliest token, one after the other, until a stop string, an eos or `max_gen_toks`, without a cache.

        Raises UsageError, naming task and keys, for any other way to choose tokens.
        """
        wanted, contexts, made = [], [], [[] for _ in requests]
        for request in requests:
            context, options = request.args
            options = normalize_gen_kwargs(options, self.max_gen_toks)
            wanted.append((handle_stop_sequences(options.pop('until'), eos=None), options.pop('max_gen_toks')))
            others = {name: value for name, value in options.items() if value or name not in GREEDY}
            if others:
                raise UsageError(f'task {request.task_name} asks for generation with {others}; here it is greedy alone')
            contexts.append(self.tok_encode(context) or [self.prefix_token_id])

        def ended(number):
            (until, limit), ids = wanted[number], made[number]
            if len(ids) >= limit or ids[-1:] == [self.eot_token_id]:
                return True
            text = self._tokenizer.decode(ids) if ids else ''
            return any(stop in text for stop in until if stop)

        going = range(len(requests))
        with tqdm(total=len(requests), desc='generate_until', disable=disable_tqdm) as bar:
            while going := [number for number in going if not ended(number)]:
                bar.update(len(requests) - len(going) - bar.n)
                rows = [(contexts[number] + made[number])[-self.max_length :] + [0] for number in going]
                for number, (_, best) in zip(going, self._each(rows, '', True), strict=True):
                    made[number].append(int(best[-1]))
        texts = [self._tokenizer.decode(ids) if ids else '' for ids in made]
        return [postprocess_generated_text(text, until, None) for text, (until, _) in zip(texts, wanted, strict=True)]

    def _windows(self, context, continuation):
        """Rows of up to `max_length` + 1 ids, and how many at the end of each are scored."""
        if len(continuation) <= self.max_length:
            yield (context + continuation)[-(self.max_length + 1) :], len(continuation)
            return
        for inputs, scored in get_rolling_token_windows(continuation, context[-1], self.max_length, context_len=1):
            yield inputs + scored[-1:], len(scored)

    def _each(self, rows, name, disable_tqdm):
        """What `_predictions` gives of every row of ids, as a pair of arrays [len(row) - 1], in the order of `rows`."""
        order, made = sorted(range(len(rows)), key=lambda number: -len(rows[number])), [None] * len(rows)
        for start in tqdm(range(0, len(rows), self.batch_size), desc=name, disable=disable_tqdm):
            numbers = order[start : start + self.batch_size]
            length = next(length for length in self._lengths if length >= len(rows[numbers[0]]) - 1)
            ids = np.zeros((self.batch_size, length + 1), np.int32)  # attention is causal: nothing sees the padding
            for padded, number in zip(ids, numbers, strict=False):
                padded[: len(rows[number])] = rows[number]
            found = jax.device_get(self._predict(self._params, meshes.to_devices(ids, self._sharding), self.layer_mask))
            for number, *of_row in zip(numbers, *found, strict=False):
                made[number] = [values[: len(rows[number]) - 1] for values in of_row]
        return made


def _predictions(params, ids, layer_mask, *, model, stretch):
    """Log-probability of each token of ids [B,T+1] but the first, and the likeliest token in its place: [B,T] each.

    Float32; the logits of `stretch` positions are there at a time.
    """
    x, _ = model.apply({'params': params}, ids[:, :-1], layer_mask, method='backbone')

    def of_position(at):
        x, targets = at
        logits = model.apply({'params': params}, x, method='logits')
        return -optax.softmax_cross_entropy_with_integer_labels(logits, targets), logits.argmax(-1)

    log_probs, best = jax.lax.map(of_position, (jnp.moveaxis(x, 1, 0), ids[:, 1:].T), batch_size=stretch)
    return log_probs.T, best.T


def open_tasks(names, task_path=None):
    """The harness's TaskManager, which knows all tasks of `names`.

    Args:
        names: tasks, groups or tags.
        task_path: a folder of YAML files that define more of them.

    Raises UsageError for an unknown task, DataError for one that cannot be read, naming it.
    """
    manager = TaskManager(include_path=task_path)
    for name in names:
        if name not in manager.all_tasks:
            raise UsageError(f'unknown task {name!r}{errors.nearest(name, manager.all_tasks)}')
        try:
            manager.load(name)
        except Exception as error:  # files, hosts and YAML may be wrong in any way
            raise DataError(f'task {name} cannot be loaded: {first_line(error)}') from error
    return manager


def run(model: Harness, manager, names, limit=None, num_fewshot=None):
    """Runs tasks of the harness.

    Args:
        model: the network.
        manager, names: of `open_tasks`.
        limit: documents of each task, or a share below 1 of them; None: all.
        num_fewshot: examples before each document; None: what the task says.

    Returns:
        (table for people, JSON object with `results` {task: {'acc,none': ..., 'acc_stderr,none': ..., ...}}).

    Raises NumericsError where a log-likelihood is not finite.
    """
    # The harness's bootstrap forks processes, which may hang beside JAX's threads; in this one, 1000 draws are enough.
    os.environ['DISABLE_MULTIPROC'] = '1'
    found = lm_eval.simple_evaluate(
        model,
        tasks=list(names),
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        bootstrap_iters=1000,
        log_samples=False,
        torch_random_seed=None,
    )
    tables = [make_table(found, part) for part in ('results', 'groups') if found.get(part)]
    kept = ('results', 'groups', 'versions', 'n-shot', 'n-samples')
    about = {'lm_eval': importlib.metadata.version('lm_eval'), 'limit': limit}
    return '\n'.join(tables), about | {part: found[part] for part in kept if part in found}
