"""Texts that a run writes at each evaluation: continuations of examples of the split that it evaluates on."""

from collections.abc import Callable
from typing import Any

import jax

from mixln_jax.data import batches
from mixln_jax.data.examples import Examples
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.evaluation import generation, prompts
from mixln_jax.evaluation.rollouts import Rollouts
from mixln_jax.models import transformer
from mixln_jax.models.sampler import Sampler
from mixln_jax.program.program import Program
from mixln_jax.runs import encoder as encoders

LONGEST = 32  # tokens of text that are continued
NEW = 64  # tokens of a continuation
ROWS = 16  # continued at a time


def scored(program: Program, examples: Any, rollouts: Rollouts) -> Callable[[Any, Any], bytes]:
    """Returns the function (weights, step) -> JSON lines, with the completion of each of the first `eval.samples`
    prompts, or of all if there are fewer, and its reward. Random numbers are those of the evaluation."""
    rows = batches.mixed(examples, min(program.config.eval.samples, len(examples)))[0]

    def write(params: Any, step: Any) -> bytes:
        return generation.json_lines(rollouts.evaluation(params, rows, examples, step)[1])

    return write


def sampling(program: Program, examples: Examples, tokenizer: Tokenizer) -> Callable[[Any, Any], bytes]:
    """Returns the function (weights, step) -> JSON lines, with a continuation of each of the first `eval.samples`
    examples, or of all if there are fewer; answers end as those of `generate`. Random numbers are the same at every
    step."""
    config, model = program.config, program.model
    assert isinstance(program.mesh, jax.sharding.Mesh), 'plans do not sample'
    template = prompts.open_template(prompts.AUTO, config, tokenizer)
    encoder = prompts.with_turn_end(encoders.of_run(config, tokenizer), template)
    sampler = Sampler(model, config.seq_length, program.mesh)
    count = min(config.eval.samples, len(examples))
    rows = batches.mixed(examples, count)[0]
    longest = min(LONGEST, config.seq_length // 2)
    contexts = [generation.context({name: rows[name][row] for name in rows}, longest) for row in range(count)]
    texts = [tokenizer.decode(ids) for ids in contexts]

    def write(params: Any, step: Any) -> bytes:
        writer = generation.Writer(sampler, params, encoder, step=transformer.needed_step(model, step))
        made = writer.complete(contexts, [()] * count, [NEW] * count, ROWS)
        return generation.json_lines(one.record(text) for text, one in zip(texts, made, strict=True))

    return write
