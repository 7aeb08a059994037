"""The main job: `python -m mixln_jax.main --config FILE [--workdir DIR] [--config.key=value ...]` trains."""

from mixln_jax.exits import stop

if __name__ == '__main__':
    stop.install()  # before the imports, which take seconds

# ruff: noqa: E402
import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
from clu import parameter_overview

from mixln_jax import checkpoint, evaluate, exits, hooks, metrics, optim, record, train
from mixln_jax import config as configs
from mixln_jax import mesh as meshes
from mixln_jax import step as steps
from mixln_jax.data import batches, tokenizers
from mixln_jax.exits import UsageError
from mixln_jax.models import llama, norms

# What may differ when a run goes on; everything else would make it another run.
MAY_CHANGE = (
    *('device', 'accumulate', 'log_every', 'model.scan_unroll', 'model.remat'),
    *('eval.', 'checkpoint.', 'mesh.', 'profile.', 'data.workers', 'data.path'),
)


def run(values, workdir, stop=None):
    """The whole job: trains, evaluates, saves; resumes what `workdir` holds.

    Args:
        values: a ConfigDict or nested dict; see config.py.
        workdir: folder of the run, made if need be.
        stop: an exits.Stop with handlers installed; None leaves signals alone, as a notebook wants it.

    Raises:
        exits.Exit and its kinds, exits.Stopped.
    """
    stop = stop or exits.Stop()
    with stop.may_interrupt():
        config = configs.build(values)
        mesh = _start_jax(config)
        devices = list(mesh.devices.flat)
        if config.batch_size % (config.accumulate * len(devices)):
            raise UsageError(
                f'config.batch_size={config.batch_size} does not divide by config.accumulate={config.accumulate} '
                f'times {len(devices)} devices (config.mesh.data)'
            )
        model = llama.from_config(config.model, config.compute_dtype)
        workdir = _open_workdir(workdir, _resolved(config, model))
        checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints', config.checkpoint.keep)
        if _finished(workdir, checkpoints, config.num_steps):
            print(f'mixln_jax: {workdir} is already finished ({config.num_steps} steps)', flush=True)
            return
        record.write_json(workdir / 'environment.json', record.environment(devices))

        tokenizer = tokenizers.open_tokenizer(config.data)
        open_rows = functools.partial(
            batches.open_rows,
            config.data,
            tokenizer=tokenizer,
            seq_length=config.seq_length,
            vocab_size=config.model.vocab_size,
        )
        rows, eval_rows = open_rows(split=config.data.split), open_rows(split=config.eval.split)
        tokenizer.save(workdir / 'tokenizer')
        _describe(config, model, rows, devices)

        optimizer = optim.optimizer(config.optim)
        init = functools.partial(steps.init_state, model, optimizer, param_dtype=config.param_dtype)
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=meshes.replicated(mesh)),
            jax.eval_shape(init, jax.random.key(config.seed)),
        )
        print(parameter_overview.get_parameter_overview(like.params, include_stats=False), flush=True)
        restored = checkpoints.restore(like)
        if restored:
            state, about = restored
            _check_same_data(about, rows, workdir)
            print(f'mixln_jax: goes on from step {about["step"]}', flush=True)
        else:
            state = jax.jit(init, out_shardings=meshes.replicated(mesh))(jax.random.key(config.seed))
            about = {'step': 0, 'tokens': 0, 'open_line': None}
        done = about['step']
        lines = record.Metrics(workdir, done, about['open_line'])

        start = time.perf_counter()
        train_step, eval_step = _compile(config, model, optimizer, like, mesh)
        compile_sec = time.perf_counter() - start
        num_params = llama.num_params(config.model, like.params)
        embedding = config.model.vocab_size * config.model.hidden_size
        meter = train.Meter(
            lines,
            workdir,
            num_steps=config.num_steps,
            log_every=config.log_every,
            log_also=lambda step: step == config.num_steps or (config.eval.every and step % config.eval.every == 0),
            tokens=about['tokens'],
            flops_per_position=metrics.flops_per_position(
                num_params, embedding, config.model.num_layers, config.model.hidden_size, config.seq_length
            ),
            devices=devices,
            first_line={'perf/compile_sec': compile_sec},
        )

    sharding = meshes.batch_sharding(mesh)
    eval_size = config.batch_size // config.accumulate
    hook_list = [
        hooks.evaluation(
            config.eval.every,
            lambda params: evaluate.evaluate(
                eval_step,
                params,
                batches.evaluation(eval_rows, eval_size),
                byte_lengths=tokenizer.byte_lengths,
                num_tokens=config.eval.tokens,
                sharding=sharding,
                check=stop.check,
            ),
            lines,
        ),
        hooks.saving(
            config.checkpoint.every,
            checkpoints,
            lines,
            lambda: {
                'tokens': meter.tokens,
                'data': {'fingerprint': rows.fingerprint},
                'config': _resolved(config, model),
            },
        ),
    ]
    dataset = batches.training(rows, seed=config.data.seed, batch_size=config.batch_size)
    reader = batches.read(dataset, done, config.data.workers)
    stream = (jax.device_put(batch, sharding) for batch in reader)
    stream = hooks.profiled(stream, done + 1, config.profile.start, config.profile.steps, workdir)
    try:
        with jax.transfer_guard('disallow'):
            state = train.fit(
                state,
                train_step,
                stream,
                hook_list,
                first=done + 1,
                last=config.num_steps,
                meter=meter,
                save=hook_list[-1][1],
                stop=stop,
                resume_hooks=about['open_line'] is not None,
            )
    finally:
        stream.close()
        reader.close()
        checkpoints.close()
        lines.close()
    first_batch = next(iter(batches.evaluation(eval_rows, eval_size)))
    distance, count = jax.jit(functools.partial(steps.distance_step, model=model))(
        state.params, jax.device_put(first_batch, sharding)
    )
    last_line = lines.lines[-1]
    print(
        record.summary_table(
            last_line, last_line['layers/grad_norm'], (distance / count).tolist(), model.norm_position
        ),
        f'weights, metrics and configuration are in {workdir}',
        sep='\n',
        flush=True,
    )


def _start_jax(config):
    """The mesh of the run, after the settings that JAX reads when it starts."""
    if config.deterministic:
        os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_gpu_deterministic_ops=true'
    mesh = meshes.make_mesh(config.device, config.mesh.data)
    # Compiled code is kept between runs, but not for CPUs: it may need instructions that the next host lacks.
    if mesh.devices.flat[0].platform != 'cpu' and not jax.config.jax_compilation_cache_dir:
        cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'mixln_jax' / 'xla'
        jax.config.update('jax_compilation_cache_dir', str(cache))
    return mesh


def _resolved(config, model):
    """The config as a dict, the placement spelled out layer by layer, as it is saved with the weights."""
    resolved = dataclasses.asdict(config)
    resolved['model'] |= {
        'norm_position': list(model.norm_position),
        'layer_index': list(model.layer_index),
        'depth': model.depth,
    }
    return resolved


def _open_workdir(workdir, resolved):
    """Makes the folder and writes config.json; refuses the folder of another run.

    Raises UsageError: not writable, or results of another configuration in it, naming the keys that differ.
    """
    workdir = pathlib.Path(workdir).expanduser().absolute()
    path = workdir / 'config.json'
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        has_results = any((workdir / 'checkpoints').glob('[0-9]*')) or record.read_metrics(workdir / 'metrics.jsonl')
        if has_results and path.exists():
            before, now = (configs.flatten(each) for each in (json.loads(path.read_text()), resolved))
            differ = [
                f'{name} (was {before.get(name)}, is {now.get(name)})'
                for name in sorted(before | now)
                if before.get(name) != now.get(name) and not name.startswith(MAY_CHANGE)
            ]
            if differ:
                raise UsageError(f'{workdir} holds a run of another configuration: {", ".join(differ)}')
        record.write_json(path, resolved)
    except (OSError, ValueError) as error:
        raise UsageError(f'the work directory {workdir} cannot be used: {error}') from None
    return workdir


def _finished(workdir, checkpoints, num_steps):
    """Whether the last step is saved and its evaluation recorded."""
    lines = record.read_metrics(workdir / 'metrics.jsonl')
    return checkpoints.latest() == num_steps and bool(lines) and lines[-1]['step'] == num_steps


def _check_same_data(about, rows, workdir):
    if about['data']['fingerprint'] != rows.fingerprint:
        raise UsageError(
            f'{workdir} was trained on other data: data.fingerprint differs (the text, the tokenizer or its mode)'
        )


def _describe(config, model, rows, devices):
    """The start line and what follows from the keys."""
    per_step = config.batch_size * config.seq_length
    named = ', '.join(f'{name} x {end - first}' for name, first, end in norms.segments(model.norm_position))
    print(
        f'{len(devices)} x {devices[0].device_kind}; placement {named}\n'
        f'{per_step:,} positions a step, {per_step * config.num_steps:,} in {config.num_steps:,} steps, '
        f'{config.batch_size * config.num_steps / len(rows):.2f} epochs of {len(rows):,} rows',
        flush=True,
    )
    for warning in norms.warnings(model.norm_position, config.model.init, config.optim.warmup_ratio):
        print(f'mixln_jax: warning: {warning}', file=sys.stderr, flush=True)


def _compile(config, model, optimizer, like, mesh):
    """The train step and the evaluation step, compiled."""
    sharding, everywhere = meshes.batch_sharding(mesh), meshes.replicated(mesh)

    def batch(size):
        shape = size, config.seq_length
        types = {'inputs': jnp.int32, 'targets': jnp.int32, 'weights': jnp.float32}
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in types.items()}

    train_step = functools.partial(
        steps.train_step,
        model=model,
        optimizer=optimizer,
        schedule=optim.schedule(config.optim, config.num_steps),
        clip_norm=config.optim.clip_norm,
        accumulate=config.accumulate,
    )
    train_step = jax.jit(train_step, donate_argnums=0, out_shardings=everywhere)
    eval_step = jax.jit(functools.partial(steps.eval_step, model=model), out_shardings=everywhere)
    return (
        train_step.lower(like, batch(config.batch_size)).compile(),
        eval_step.lower(like.params, batch(config.batch_size // config.accumulate)).compile(),
    )


def parse(argv):
    """(options, ConfigDict) of the words behind the command. Raises UsageError; --help prints and exits with 0."""
    parser = argparse.ArgumentParser(
        prog='python -m mixln_jax.main',
        description='Trains what a recipe says. The same command again goes on where the run stopped.',
        epilog=f"keys of a recipe, with the Mix-LN paper's C4 recipe as defaults:\n{configs.help_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument('--config', metavar='FILE[:ARG]', required=True, help='a recipe, such as configs/quickstart.py')
    parser.add_argument('--workdir', metavar='DIR', help='folder of the run [runs/<name of the recipe>]')
    parser.add_argument('--config.KEY', metavar='VALUE', help='another value for a key of the recipe')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')

    def fail(message):
        raise UsageError(message)

    parser.error = fail
    options, rest = parser.parse_known_args(argv)
    overrides, rest = [], iter(rest)
    for word in rest:
        key, equals, text = word.partition('=')
        if not key.startswith('--config.'):
            raise UsageError(f'unexpected argument {word!r}; --help lists them')
        text = text if equals else next(rest, None)
        if text is None:
            raise UsageError(f'{key} needs a value')
        overrides.append((key.removeprefix('--config.'), text))
    options.workdir = options.workdir or f'runs/{pathlib.Path(options.config.partition(":")[0]).stem}'
    return options, configs.load(options.config, overrides)


def main(argv):
    """The command; returns its exit code."""

    def job():
        options, config = parse(argv)
        run(config, options.workdir, stop)

    return exits.call(job, traceback='--traceback' in argv)


if __name__ == '__main__':
    stop.started()
    code = main(sys.argv[1:])
    if code == exits.STOPPED:  # everything is closed; Python's own end may crash where a signal cut the compiler short
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
