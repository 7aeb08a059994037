"""The main job: `python -m mixln_jax.main --config FILE [--workdir DIR] [--config.key=value ...]` trains."""

from mixln_jax.exits import stop

if __name__ == '__main__':
    stop.install()  # before the imports, which take seconds

# ruff: noqa: E402
import argparse
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
import numpy as np
from clu import parameter_overview

from mixln_jax import (
    checkpoint,
    console,
    evaluate,
    exits,
    hooks,
    measures,
    outputs,
    paths,
    processes,
    record,
    train,
    weights,
)
from mixln_jax import config as configs
from mixln_jax import mesh as meshes
from mixln_jax.analysis import during
from mixln_jax.data import batches
from mixln_jax.data import rows as data_rows
from mixln_jax.exits import CheckpointError, UsageError
from mixln_jax.models import llama, norms
from mixln_jax.program import Program

# What may differ when a run goes on; everything else would make it another run.
MAY_CHANGE = (
    *('device', 'accumulate', 'log_every', 'model.scan_unroll', 'model.remat', 'model.attention'),
    *('eval.', 'checkpoint.', 'mesh.', 'processes.', 'analysis.', 'profile.', 'expected.'),
    *('data.workers', 'data.path', 'data.data_dir', 'data.tokenizer_path'),  # to the same content
    *('init_from', 'resume_from'),  # where a run begins; once it has a checkpoint they are not even read
)
ANOTHER = 'give another --workdir'


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
    exits.end_if_imported()
    console.guard_files()
    config = configs.build(values)
    _check_place(workdir)  # before anything takes time
    with contextlib.ExitStack() as closing:
        stop = stop or exits.Stop()
        with stop.may_interrupt():
            joined = processes.joined(config.processes.timeout, _digest(config), config.processes.secret)
            closing.enter_context(joined)
            stop = processes.SharedStop() if jax.distributed.is_initialized() else stop
            mesh = _start_jax(config)
            config = configs.build(values, _earlier(config, workdir))
            if jax.process_count() > 1:
                who = f'process {jax.process_index()}/{jax.process_count()}'
                record.say(f'mixln_jax: {who}, {len(mesh.local_devices)} local of {mesh.size} devices')
            if jax.process_index():  # one of several speaks
                nowhere = closing.enter_context(open(os.devnull, 'w', encoding='utf-8'))
                closing.enter_context(contextlib.redirect_stdout(nowhere))
            program = Program(config, mesh)
            model = program.model
            resolved = _resolved(config, model)
            given, workdir = workdir, closing.enter_context(_open_workdir(workdir, resolved))
            processes.check_shared(workdir)
            with stop.wait():
                checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints', config.checkpoint.keep)
                closing.callback(checkpoints.close)
            if _finished(workdir, checkpoints, config.num_steps):
                record.say(f'mixln_jax: {workdir} is already finished ({config.num_steps} steps)')
                return
            tokenizer, rows, eval_rows = _open_data(config)
            _describe(config, program, rows, mesh, verbose)
            state, about = _first_state(program, resolved, checkpoints, rows.fingerprint, stop)
            if checkpoints.latest() is not None:
                _check_metrics(workdir, about, config.num_steps)
            shared = workdir
            if jax.process_index():  # one of several writes the records
                workdir = pathlib.Path(closing.enter_context(tempfile.TemporaryDirectory()))
            record.write_json(workdir / 'config.json', resolved)
            seen = {'data': rows.fingerprint, 'eval_data': {'split': config.eval.split} | eval_rows.fingerprint}
            record.write_json(workdir / 'environment.json', record.environment(list(mesh.devices.flat)) | seen)
            tokenizer.save(workdir / 'tokenizer')
            lines = record.Metrics(workdir, about['step'], about['open_line'], during.PICTURES)
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
                return evaluate.evaluate(
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
        meter = train.Meter(
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
            collapse=train.Collapse(
                config.collapse,
                round(config.optim.warmup_ratio * config.num_steps),
                lambda: _unigram_entropy(rows, config),
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
            state = train.fit(
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
        record.say(record.summary_table(lines.lines[-1], model.norm_position))
        record.say(
            f'weights, metrics and configuration are in {given}',
            f'next: python -m mixln_jax.report {shlex.quote(str(given))}',
        )


def _digest(config):
    return hashlib.blake2b(json.dumps([configs.public(config), record.versions()]).encode()).hexdigest()


def _start_jax(config):
    """The mesh of the run, after the settings that JAX reads when it starts."""
    if config.deterministic:
        os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_gpu_deterministic_ops=true'
    meshes.keep_heap(config.device)
    mesh = meshes.make_mesh(config.mesh, meshes.devices(config.device))
    # Compiled code is kept between runs, but not for CPUs: it may need instructions that the next host lacks.
    if mesh.devices.flat[0].platform != 'cpu' and not jax.config.jax_compilation_cache_dir:
        with contextlib.suppress(OSError):  # a home that cannot be written to: each start compiles
            (cache := record.cache() / 'xla').mkdir(parents=True, exist_ok=True)
            jax.config.update('jax_compilation_cache_dir', str(cache))
    return mesh


def _resolved(config, model):
    """The config as a dict, the placement spelled out layer by layer, as it is saved with the weights."""
    resolved = configs.public(config)
    resolved['model'] |= {
        'norm_position': list(model.norm_position),
        'layer_index': list(model.layer_index),
        'depth': model.depth,
    }
    return resolved


def _earlier(config, workdir):
    """The configuration of the run that goes on, in `workdir` or from `resume_from`; None where there is none."""
    workdir = pathlib.Path(workdir).expanduser()
    try:
        if _has_results(workdir):
            return configs.read(workdir / 'config.json')
        folder = config.resume_from and weights.checkpoint_folder(config.resume_from)
        return configs.read(folder.parents[1] / 'config.json') if folder else None
    except (exits.Exit, OSError):  # what is wrong with it is said where it is opened
        return None


def _has_results(workdir):
    return any((workdir / 'checkpoints').glob('[0-9]*')) or record.read_metrics(workdir / 'metrics.jsonl')


def _check_place(workdir):
    """The whole path of a work directory. Raises UsageError where checkpoints cannot be kept, or in another run."""
    outputs.place(workdir, '--workdir')
    return paths.for_arrays(workdir, '--workdir')


@contextlib.contextmanager
def _open_workdir(workdir, resolved):
    """Makes the folder and keeps other processes out of it; refuses the folder of another run. A run that ends
    before it has results leaves nothing that was not there before.

    Raises UsageError: not writable, in use, files of something else in it that a run would write over, or results of
    another configuration, naming the keys that differ.
    """
    workdir = _check_place(workdir)
    path, speaks = workdir / 'config.json', not jax.process_index()
    with contextlib.ExitStack() as closing:
        try:
            made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
            if speaks:  # one of several makes it, and removes it
                workdir.mkdir(parents=True, exist_ok=True)
            processes.meet('work directory')
            workdir.mkdir(parents=True, exist_ok=True)
            there = {*os.listdir(workdir)}
            before = resolved
            if _has_results(workdir) and path.exists():
                before = paths.read_json(path, UsageError)
            _check_free(workdir)
            if speaks:
                busy = f'the work directory {workdir} is in use by another process'
                closing.enter_context(outputs.locked(workdir / '.lock', busy, keep=True))
                for mark in workdir.glob('.seen-by-all-*'):  # of a start that was killed
                    mark.unlink(missing_ok=True)
        except (OSError, ValueError) as error:
            raise UsageError(f'the work directory {workdir} cannot be used: {error}') from None
        _check_same_run(workdir, before, resolved, ANOTHER)
        try:
            yield workdir
        except BaseException as error:
            if not workdir.is_dir():
                if isinstance(error, exits.Stopped | exits.Exit) and not isinstance(error, CheckpointError):
                    raise
                gone = f'the work directory {workdir} has gone: it was moved or removed while the run used it'
                raise UsageError(gone) from error
            if speaks and not _has_results(workdir):
                _remove_traces(workdir, made, there)
            raise


def _check_free(workdir):
    """Raises UsageError where a folder without results holds what is no run's and a run would write over."""
    if _has_results(workdir):
        return
    path = workdir / 'config.json'
    try:
        ours = 'model' in paths.read_json(path, UsageError)
    except FileNotFoundError:
        path = next((path for name in ('tokenizer/*', 'environment.json') for path in workdir.glob(name)), None)
        ours = path is None
    except UsageError:
        ours = False
    if not ours:
        raise UsageError(f'the work directory {workdir} holds {path.relative_to(workdir)} of something else; {ANOTHER}')


def _remove_traces(workdir, made, there):
    """Removes what this process has written into the work directory, and the folders `made`, where nothing else is in
    them; `there` are the names that it found. What is for people, debug/ and profile/, keeps all."""
    new = [path for path in workdir.iterdir() if path.name not in there]
    if 'config.json' not in there and 'tokenizer' in there:  # it was empty, as _check_free has seen
        new += (workdir / 'tokenizer').iterdir()
    if {path.name for path in new} & {'debug', 'profile'}:
        return
    for path in new:
        if path.name in ('checkpoints', 'tokenizer'):
            shutil.rmtree(path, ignore_errors=True)
        elif (
            path.parent != workdir
            or path.name in ('.lock', 'config.json', 'environment.json', 'metrics.jsonl')
            or 'tfevents' in path.name
        ):
            path.unlink(missing_ok=True)
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _check_same_run(where, before, now, way_out):
    """Raises UsageError, naming the keys and the way out, where two resolved configs are not of one run."""
    before, now = configs.flatten(configs.Config()) | configs.flatten(before), configs.flatten(now)
    # The authors' mean of the micro-batches' means depends on how many they are.
    may_change = tuple(name for name in MAY_CHANGE if name != 'accumulate' or now['compat'] == 'none')
    differ = [
        f'{name} (was {before.get(name)}, is {now.get(name)})'
        for name in sorted(before | now)
        if before.get(name) != now.get(name) and name not in may_change and f'{name.split(".")[0]}.' not in may_change
    ]
    if differ:
        raise UsageError(f'{where} holds a run of another configuration: {", ".join(differ)}; {way_out}')


def _finished(workdir, checkpoints, num_steps):
    """Whether the last step is saved and its metrics line complete. Raises CheckpointError for damaged records."""
    if checkpoints.latest() != num_steps:
        return False
    try:
        about = checkpoints.about(num_steps)
    except Exception:  # whoever restores it says what is wrong
        return False
    if about['open_line'] is not None:
        return False
    _check_metrics(workdir, about, num_steps)
    return True


def _check_metrics(workdir, about, num_steps):
    """Raises CheckpointError where metrics.jsonl lacks what was there when the checkpoint was saved."""
    complete = about['open_line'] is None
    lines = record.check_metrics(workdir / 'metrics.jsonl', about['step'] + complete, about.get('metrics'))
    at_end = complete and about['step'] == num_steps  # the last step always has a line
    if at_end and (not lines or lines[-1]['step'] != num_steps):
        raise CheckpointError(f'{workdir} is trained to the end, but its metrics.jsonl lacks the last step')


def _open_data(config):
    """(tokenizer, rows to train on, rows to evaluate on)."""
    tokenizer = data_rows.open_tokenizer(config.data)
    rows = [
        data_rows.open_rows(config.data, split, tokenizer, config.seq_length, config.model.vocab_size)
        for split in (config.data.split, config.eval.split)
    ]
    if config.data.split == config.eval.split or 'all' in (config.data.split, config.eval.split):
        keys = f'config.eval.split={config.eval.split} and config.data.split={config.data.split}'
        record.say(f'mixln_jax: warning: evaluates on text that it trains on ({keys})', file=sys.stderr)
    return tokenizer, *rows


def _first_state(program, resolved, checkpoints, fingerprint, stop):
    """The state to begin with and its JSON object: the newest good checkpoint's, else that of `resume_from`, else a
    fresh state, with the weights of `init_from` if that is given.

    Raises UsageError for a checkpoint that has seen other data, or of another configuration.
    """
    config = program.config
    with stop.wait():  # cut short, a restore would look like damage
        restored, where, way_out = checkpoints.restore(program.state), 'checkpoint', ANOTHER
        if not restored and config.resume_from:
            where, way_out = f'config.resume_from={config.resume_from}: checkpoint', 'init_from takes its weights alone'
            restored = _resume_from(config, program.state)
    if not restored:
        state = program.init(jax.random.key(config.seed))
        if config.init_from:
            params = weights.initial(config.init_from, program.model)
            state = state.replace(params=_placed(params, program.state.params))
            record.say(f'mixln_jax: starts from the weights of {config.init_from}')
        return state, {'step': 0, 'tokens': 0, 'open_line': None}
    state, about = restored
    where = f'{where} {about["step"]}'
    _check_same_run(where, about['config'], resolved, way_out)
    differ = [
        f'data.fingerprint.{part}' for part, seen in about['data']['fingerprint'].items() if fingerprint[part] != seen
    ]
    if differ:
        raise UsageError(f'{where} has seen other data: {", ".join(differ)} differs; {way_out}')
    record.say(f'mixln_jax: goes on from step {about["step"]}')
    return state, about


def _unigram_entropy(rows, config):
    """Of the first tokens of training, enough for frequencies, in nats."""
    counts = np.zeros(config.model.vocab_size)
    dataset = batches.training(rows, seed=config.data.seed, batch_size=config.batch_size)
    for batch in map(dataset.__getitem__, range(1000)):
        counts += np.bincount(batch['targets'][batch['weights'] > 0], minlength=len(counts))
        if counts.sum() > 500_000:
            break
    return measures.unigram_entropy(counts)


def _resume_from(config, like):
    """(state, JSON object) of the checkpoint that `resume_from` names, which is not touched."""

    def read(folder):
        with contextlib.closing(checkpoint.Checkpoints(folder.parent, read_only=True)) as source:
            return source.read(int(folder.name), like)

    try:
        _, state, about = weights.read_newest(config.resume_from, read)
        if about['step'] == config.num_steps and about['open_line'] is None:
            raise UsageError(f'it is trained to its end, step {config.num_steps}')
    except (UsageError, CheckpointError) as error:
        raise type(error)(f'config.resume_from={config.resume_from}: {error}') from None
    return state, about


def _placed(params, like):
    """Arrays that every process has whole, in the types and shardings of `like`."""

    def of(values, leaf):
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda at: values[at].astype(leaf.dtype))

    return jax.tree.map(of, params, like)


def _describe(config, program, rows, mesh, verbose):
    """The start line and what follows from the keys; with `verbose` a table of the parameters."""
    model, params, analyses = program.model, program.state.params, config.analysis.tokens
    if verbose:
        record.say(parameter_overview.get_parameter_overview(params, include_stats=False))
    per_step = config.batch_size * config.seq_length
    numbers = {name: getattr(config.optim, name) for name in configs.PUBLISHED[config.optim.name]}
    attention = '; attention by cuDNN' if model.config.attention == 'cudnn' else ''
    record.say(
        f'{mesh.size} x {mesh.devices.flat[0].device_kind}{attention}'
        f'; placement {norms.spelled(model.norm_position)}\n'
        f'{llama.num_params(config.model, params):,} parameters{"" if verbose else " (--verbose lists them)"}\n'
        f'{per_step:,} positions a step, {per_step * config.num_steps:,} in {config.num_steps:,} steps, '
        f'{config.batch_size * config.num_steps / len(rows):.2f} epochs of {len(rows):,} rows\n'
        f'optimiser {config.optim.name}: {", ".join(f"{name} {number:g}" for name, number in numbers.items()) or "-"}'
    )
    if analyses:
        share = during.share(config, program.flops_per_position())
        record.say(f'analyses on {analyses:,} tokens: {share:.2%} of the FLOPs of training')
    for warning in norms.warnings(model.norm_position, config.model.init, config.optim.warmup_ratio):
        record.say(f'mixln_jax: warning: {warning}', file=sys.stderr)


def parse(argv):
    """(options, ConfigDict) of the words after the command. Raises UsageError; --help prints and exits with 0."""
    parser = argparse.ArgumentParser(
        prog='python -m mixln_jax.main',
        usage='%(prog)s --config FILE[:ARG] [--workdir DIR] [--config.KEY=VALUE ...] [--verbose] [--traceback]',
        description='Trains what a recipe says. The same command again goes on where the run stopped.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument('-h', '--help', action='store_true', help='show this; with --config FILE the values of FILE')
    parser.add_argument('--config', metavar='FILE[:ARG]', help='a recipe, such as configs/quickstart.py')
    parser.add_argument('--workdir', metavar='DIR', help='folder of the run [runs/<name of the recipe>]')
    parser.add_argument('--verbose', action='store_true', help='list the parameters at the start')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')
    options, rest = exits.parse(parser, argv, known=True)
    config = configs.load(options.config, configs.overrides(rest)) if options.config else None
    if options.help:
        shown = "with the Mix-LN paper's C4 recipe as defaults"
        if config:
            shown = f'with the values of {options.config}, * where they are not the defaults'
        names = {'model.norm_position': [*norms.PLACEMENTS, *norms.SCHEMES]}
        parser.epilog = f'keys of a recipe, {shown}:\n{configs.help_text(config, names)}'
        parser.print_help()
        parser.exit()
    if not options.config:
        raise UsageError('--config FILE is missing; --help lists the keys')
    file, _, argument = options.config.partition('.py:')
    if options.workdir is None:
        options.workdir = f'runs/{pathlib.Path(file).stem}{argument and f"_{argument}"}'
    return options, config


def main(argv):
    """The command; returns its exit code."""

    def job():
        options, config = parse(argv)
        run(config, options.workdir, stop, options.verbose)

    return exits.call(job, show_traceback='--traceback' in argv)


if __name__ == '__main__':
    stop.started()
    code = main(sys.argv[1:])
    if code == exits.STOPPED or jax.distributed.is_initialized():
        processes.end(code)  # everything is closed; Python's own end may crash where a signal cut the compiler short
    sys.exit(code)
