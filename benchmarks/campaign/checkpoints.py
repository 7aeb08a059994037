"""Checkpoints damaged: bytes flipped, files and folders gone or others."""

import contextlib
import io
import itertools
import pathlib
import random
import re
import shutil

from benchmarks.campaign.judging import expect, judged, refused
from benchmarks.campaign.run import LAST, bits, contents
from mixln_jax.runs import checkpoint, checkpoint_folders, weights


def load(base, run, codes):
    try:
        found = weights.load(run)
    except Exception as error:
        return refused(error, codes)
    expect(bits(found.params) == base.params.get(found.step), f'wrong weights, as step {found.step}')
    return 'as saved' if found.step == LAST else 'a step before'


def restore(base, run, codes):
    before = {body for name, body in contents(run / 'checkpoints').items() if checkpoint_folders.METADATA not in name}
    try:
        with contextlib.closing(checkpoint.Checkpoints(run / 'checkpoints', keep=9)) as kept:
            state, about = kept.restore(base.like)
    except Exception as error:
        outcome = refused(error, codes)
    else:
        step = about['step']
        expect(bits(state) == base.states.get(step) and about == base.about[step], f'wrong state, as step {step}')
        outcome = 'as saved' if step == LAST else 'a step before'
    expect(before <= {*contents(run / 'checkpoints').values()}, 'something of the checkpoints is lost')
    return outcome


def read(base, row, name, damage, codes):
    with base.copy() as run:
        damage(run)
        for verb, way in (('evaluated', load), ('gone on', restore)):
            with contextlib.redirect_stderr(io.StringIO()):
                yield judged(f'{row}, {verb}', name, way, base, run, codes)


def flips(base, count=60):
    """Bytes changed, at random places of random files of the newest checkpoint."""
    chance, newest = random.Random(0), base.run / f'checkpoints/{LAST}'
    files = [path for path in sorted(newest.rglob('*')) if path.is_file() and path.stat().st_size]
    for number in range(count):  # every second one where most bytes are
        [path] = chance.choices(files, [path.stat().st_size if number % 2 else 1 for path in files])
        content = bytearray(path.read_bytes())
        at, by = chance.randrange(len(content)), chance.randrange(1, 256)
        content[at] ^= by
        file = path.relative_to(base.run)
        damage = lambda run, file=file, content=content: (run / file).write_bytes(content)  # noqa: E731
        yield from read(base, 'bytes flipped in a checkpoint', f'{file} byte {at} by {by}', damage, {5})


def remove(path):
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def replace(path, make):
    old = path.rename(path.with_name('old'))
    make(path)
    remove(old)


def before(path):
    """The same in the checkpoint of the step before."""
    return pathlib.Path(re.sub(rf'checkpoints/{LAST}(?=/|$)', f'checkpoints/{LAST - 1}', str(path)))


def copied(source, to):
    (shutil.copytree if source.is_dir() else shutil.copy)(source, to)


def swap(path):
    hold = path.rename(path.with_name('hold'))
    before(path).rename(path)
    hold.rename(before(path))


WAYS = {
    'deleted': remove,
    'emptied': lambda path: replace(path, pathlib.Path.mkdir if path.is_dir() else pathlib.Path.touch),
    'cut short': lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    'a folder in its place': lambda path: replace(path, pathlib.Path.mkdir),
    'a link to nothing': lambda path: replace(path, lambda path: path.symlink_to('nothing')),
    'a link to that of the step before': lambda path: replace(path, lambda path: path.symlink_to(before(path))),
    'that of the step before': lambda path: replace(path, lambda path: copied(before(path), path)),
    'changed for that of the step before': swap,
    'named 7': lambda path: path.rename(path.with_name('7')),
    'with a zero before its name': lambda path: path.rename(path.with_name(f'0{path.name}')),
    'a copy of it next to it, named 7': lambda path: copied(path, path.with_name('7')),
}


def structure(base, count=50):
    """Files and folders of the newest checkpoint damaged, the checkpoint itself first."""
    newest = base.run / f'checkpoints/{LAST}'
    cases = list(itertools.product(sorted(newest.rglob('*')), WAYS))
    random.Random(0).shuffle(cases)
    cases = [
        (path.relative_to(base.run), way)
        for path, way in [*itertools.product([newest], WAYS), *cases]
        if (way != 'cut short' or path.is_file()) and ('step before' not in way or before(path).exists())
    ]
    for file, way in cases[:count]:
        damage = lambda run, file=file, way=way: WAYS[way](run / file)  # noqa: E731
        yield from read(base, 'checkpoints damaged in structure', f'{file}: {way}', damage, {2, 5})
