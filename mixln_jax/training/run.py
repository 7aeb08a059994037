"""The whole job."""

import contextlib
import hashlib
import json
import os
import pathlib
import shlex
import shutil
import sys
import tempfile
import time

import jax
from clu import parameter_overview

from mixln_jax import config as configs
from mixln_jax.analysis import during
from mixln_jax.data import batches
from mixln_jax.data import rows as data_rows
from mixln_jax.distributed import mesh as meshes
from mixln_jax.distributed import processes
from mixln_jax.evaluation import loop as evaluation
from mixln_jax.models import llama, placements
from mixln_jax.program.program import Program
from mixln_jax.runs import checkpoint, environment, log
from mixln_jax.runs.workdir import (
    check_metrics,
    check_place,
    earlier_config,
    is_finished,
    open_workdir,
    resolved_config,
)
from mixln_jax.system import console, files, outputs, signals
from mixln_jax.training import hooks, loop
from mixln_jax.training.collapse import Collapse, data_entropy
from mixln_jax.training.meter import Meter
from mixln_jax.training.start import first_state


def run(values, workdir, stop=None, verbose=False):
    """The whole job: trains, evaluates, saves; resumes what `workdir` holds.

    Args:
        values: a ConfigDict or nested dict; see config.py.
        workdir: folder of the run, made if need be.
        stop: an exits.Stop with handlers installed; None leaves signals alone, as a notebook wants it.
        verbose: whether to list the parameters.

    Raises:
        exits.Exit and its kinds, exits.Stopped.
    """
    signals.end_if_imported()
    console.guard_files()
    config = configs.build(values)
    check_place(workdir)  # before anything takes time
    with contextlib.ExitStack() as closing:
        stop = stop or signals.Stop()
        with stop.may_interrupt():
            joined = processes.joined(config.processes.timeout, _digest(config), config.processes.secret)
            closing.enter_context(joined)
            stop = processes.SharedStop() if jax.distributed.is_initialized() else stop
            mesh = _start_jax(config)
            config = configs.build(values, earlier_config(config, workdir))
            if jax.process_count() > 1:
                who = f'process {jax.process_index()}/{jax.process_count()}'
                console.say(f'mixln_jax: {who}, {len(mesh.local_devices)} local of {mesh.size} devices')
            if jax.process_index():  # one of several speaks
                nowhere = closing.enter_context(open(os.devnull, 'w', encoding='utf-8'))
                closing.enter_context(contextlib.redirect_stdout(nowhere))
            program = Program(config, mesh)
            model = program.model
            resolved = resolved_config(config, model)
            given, workdir = workdir, closing.enter_context(open_workdir(workdir, resolved))
            processes.check_shared(workdir)
            with stop.wait():
                checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints', config.checkpoint.keep)
                closing.callback(checkpoints.close)
            if is_finished(workdir, checkpoints, config.num_steps):
                console.say(f'mixln_jax: {workdir} is already finished ({config.num_steps} steps)')
                return
            tokenizer, rows, eval_rows = _open_data(config)
            _describe(config, program, rows, mesh, verbose)
            state, about = first_state(program, resolved, checkpoints, rows.fingerprint, stop)
            if checkpoints.latest() is not None:
                check_metrics(workdir, about, config.num_steps)
            shared = workdir
            if jax.process_index():  # one of several writes the records
                workdir = pathlib.Path(closing.enter_context(tempfile.TemporaryDirectory()))
            outputs.write_json(workdir / 'config.json', resolved)
            seen = {'data': rows.fingerprint, 'eval_data': {'split': config.eval.split} | eval_rows.fingerprint}
            outputs.write_json(workdir / 'environment.json', environment.environment(list(mesh.devices.flat)) | seen)
            tokenizer.save(workdir / 'tokenizer')
            lines = log.Metrics(workdir, about['step'], about['open_line'], during.PICTURES)
            closing.callback(lines.close)
            start = time.perf_counter()
            train_step, eval_step = program.compile()
            compile_sec = time.perf_counter() - start

        def save_debug(state):
            folder = shared / 'debug/checkpoints'
            if not jax.process_index():
                shutil.rmtree(folder, ignore_errors=True)
            processes.meet('debug')
            with contextlib.closing(checkpoint.Checkpoints(folder, keep=1)) as kept:
                kept.save(int(jax.device_get(state.step)), state, {'config': resolved})

        sharding = meshes.batch_sharding(mesh)

        def watched(reader):
            reader, end = iter(reader), object()
            while True:
                processes.watch(config.processes.stall)
                with stop.interruptible():  # reading may hang
                    batch = next(reader, end)
                if batch is end:
                    return
                yield batch

        def checked(of_sample):
            for batch in watched(of_sample):
                stop.check()
                yield batch

        def evaluate_weights(params):
            dataset = batches.evaluation(eval_rows, config.batch_size // config.accumulate, sized=True)
            with contextlib.closing(batches.read(dataset, 0, workers=0)) as reader:
                return evaluation.evaluate(
                    eval_step,
                    params,
                    watched(reader),
                    at_a_time=config.accumulate,
                    num_tokens=config.eval.tokens,
                    sharding=sharding,
                    check=stop.check,
                    official=config.compat != 'none',
                )

        measuring = [hooks.evaluation(config.eval.every, evaluate_weights, lines)]
        if config.analysis.tokens:
            analyses = during.Analyses(config, model, eval_rows, checked)
            measuring.append(hooks.analysis(config.analysis.every, analyses, lines))
        meter = Meter(
            lines,
            workdir,
            num_steps=config.num_steps,
            log_every=config.log_every,
            log_also=lambda step: (
                step == config.num_steps or any(every and step % every == 0 for every, _ in measuring)
            ),
            tokens=about['tokens'],
            flops_per_position=program.flops_per_position(),
            devices=list(mesh.devices.flat),
            first_line={'perf/compile_sec': compile_sec},
            collapse=Collapse(
                config.collapse,
                round(config.optim.warmup_ratio * config.num_steps),
                lambda: data_entropy(rows, config),
            ),
            save_debug=save_debug,
        )

        def about_state():
            return {'tokens': meter.tokens, 'data': {'fingerprint': rows.fingerprint}, 'config': resolved}

        saving = hooks.saving(config.checkpoint.every, checkpoints, lines, about_state)
        done = about['step']
        part = meshes.local_rows(sharding, config.batch_size)
        dataset = batches.training(rows, seed=config.data.seed, batch_size=config.batch_size, part=part)
        reader = closing.enter_context(contextlib.closing(batches.read(dataset, done, config.data.workers)))
        closing.callback(processes.watch, 0)
        if not done and model.measured() and not config.init_from:  # given weights have theirs
            state = program.measure_factors(state, meshes.place(dataset[0], sharding, config.batch_size))
        stream = (meshes.place(batch, sharding, config.batch_size) for batch in watched(reader))
        stream = hooks.profiled(stream, done + 1, config.profile.start, config.profile.steps, workdir)
        with jax.transfer_guard('disallow'), contextlib.closing(stream):
            state = loop.fit(
                state,
                train_step,
                stream,
                [*measuring, saving],
                first=done + 1,
                last=config.num_steps,
                meter=meter,
                save=saving[1],
                stop=stop,
                resume_hooks=about['open_line'] is not None,
            )
            checkpoints.wait()
        processes.watch(0)
        del state  # what is read back takes its room
        checkpoints.read_back(config.num_steps, program.state)
        console.say(log.summary_table(lines.lines[-1], model.norm_position))
        console.say(
            f'weights, metrics and configuration are in {given}',
            f'next: python -m mixln_jax.report {shlex.quote(str(given))}',
        )


def _digest(config):
    return hashlib.blake2b(json.dumps([configs.public(config), environment.versions()]).encode()).hexdigest()


def _start_jax(config):
    """The mesh of the run, after the settings that JAX reads when it starts."""
    if config.deterministic:
        os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_gpu_deterministic_ops=true'
    meshes.keep_heap(config.device)
    mesh = meshes.make_mesh(config.mesh, meshes.devices(config.device))
    # Compiled code is kept between runs, but not for CPUs: it may need instructions that the next host lacks.
    if mesh.devices.flat[0].platform != 'cpu' and not jax.config.jax_compilation_cache_dir:
        with contextlib.suppress(OSError):  # a home that cannot be written to: each start compiles
            (cache := files.cache() / 'xla').mkdir(parents=True, exist_ok=True)
            jax.config.update('jax_compilation_cache_dir', str(cache))
    return mesh


def _open_data(config):
    """(tokenizer, rows to train on, rows to evaluate on)."""
    tokenizer = data_rows.open_tokenizer(config.data)
    rows = [
        data_rows.open_rows(config.data, split, tokenizer, config.seq_length, config.model.vocab_size)
        for split in (config.data.split, config.eval.split)
    ]
    if config.data.split == config.eval.split or 'all' in (config.data.split, config.eval.split):
        keys = f'config.eval.split={config.eval.split} and config.data.split={config.data.split}'
        console.say(f'mixln_jax: warning: evaluates on text that it trains on ({keys})', file=sys.stderr)
    return tokenizer, *rows


def _describe(config, program, rows, mesh, verbose):
    """The start line and what follows from the keys; with `verbose` a table of the parameters."""
    model, params, analyses = program.model, program.state.params, config.analysis.tokens
    if verbose:
        console.say(parameter_overview.get_parameter_overview(params, include_stats=False))
    per_step = config.batch_size * config.seq_length
    numbers = {name: getattr(config.optim, name) for name in configs.PUBLISHED[config.optim.name]}
    attention = '; attention by cuDNN' if model.config.attention == 'cudnn' else ''
    console.say(
        f'{mesh.size} x {mesh.devices.flat[0].device_kind}{attention}'
        f'; placement {placements.spelled(model.norm_position)}\n'
        f'{llama.num_params(config.model, params):,} parameters{"" if verbose else " (--verbose lists them)"}\n'
        f'{per_step:,} positions a step, {per_step * config.num_steps:,} in {config.num_steps:,} steps, '
        f'{config.batch_size * config.num_steps / len(rows):.2f} epochs of {len(rows):,} rows\n'
        f'optimiser {config.optim.name}: {", ".join(f"{name} {number:g}" for name, number in numbers.items()) or "-"}'
    )
    if analyses:
        share = during.share(config, program.flops_per_position())
        console.say(f'analyses on {analyses:,} tokens: {share:.2%} of the FLOPs of training')
    for warning in placements.warnings(model.norm_position, config.model.init, config.optim.warmup_ratio):
        console.say(f'mixln_jax: warning: {warning}', file=sys.stderr)
