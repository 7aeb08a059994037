"""What commands write: nobody else's files go, two at once do no harm, and no library looks elsewhere."""

import fcntl
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import pytest
from matplotlib.figure import Figure

from mixln_jax import config as configs
from mixln_jax import evaluate, main
from mixln_jax.analysis import command
from mixln_jax.data import train_tokenizer
from mixln_jax.data.prepare import job as jobs
from mixln_jax.report import command as report
from mixln_jax.report import figures, markdown, page
from mixln_jax.runs import checkpoint, checkpoint_folders, weights, workdir
from mixln_jax.system import errors, files, outputs
from mixln_jax.system.errors import CheckpointError, UsageError

STATE = {'params': {'a': jnp.arange(6.0).reshape(2, 3)}}


def make_run(folder):
    """What looks like a run, to those who must not write into it."""
    for name in ('checkpoints/5', 'tokenizer', 'debug'):
        (folder / name).mkdir(parents=True)
    (folder / 'config.json').write_text('{"model": {}}')
    (folder / 'tokenizer/tokenizer.json').write_text('mine')
    return folder


def tree(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob('*')}


class TestPaths:
    @pytest.mark.parametrize('part', ['q\\r', 'a*', '?', '[ab]', 'x/[!a]', '**', 'gs:/a', 'ags:/b', '../a\\'])
    def test_where_arrays_would_land_elsewhere(self, tmp_path, part):
        with pytest.raises(UsageError, match='--workdir: checkpoints cannot be kept in a path with'):
            files.for_arrays(tmp_path / part, '--workdir')
        with pytest.raises(UsageError, match='checkpoints cannot be kept'):
            checkpoint.Checkpoints(tmp_path / part)
        with pytest.raises(UsageError, match='checkpoints cannot be kept'):
            checkpoint.read_params(tmp_path / part)
        assert not list(tmp_path.iterdir())

    def test_the_folder_around_counts(self, tmp_path, monkeypatch):
        (tmp_path / 'q\\r').mkdir()
        monkeypatch.chdir(tmp_path / 'q\\r')
        with pytest.raises(UsageError, match=r'in a path with \\ '):
            workdir.check_folder('run')

    def test_roots_that_stand_for_buckets(self):
        for root in ('/gs/a', '/s3/a'):
            with pytest.raises(UsageError, match=f'in a path with {root[:4]} '):
                files.for_arrays(root, '--workdir')

    def test_what_is_spelled_otherwise_is_no_other_place(self, tmp_path):
        assert files.for_arrays(f'/{tmp_path}', '') == files.for_arrays(tmp_path, '') == tmp_path
        for name in ('a b', 'é\n%41#|', '[a', 'a]', 'a:b', '~', '\'"$(x)', '😀'):
            assert files.for_arrays(tmp_path / name, '') == tmp_path / name

    def test_bytes_that_are_not_utf8(self):
        with pytest.raises(UsageError, match=r'--out a\\udcff.*not UTF-8') as error:
            files.local('a\udcff', '--out')
        assert str(error.value).isascii()

    @pytest.mark.parametrize(
        'command, words',
        [
            (evaluate.main, ['--checkpoint', 'x', '--out', '']),
            (report.main, ['.', '--out', '']),
            (train_tokenizer.main, ['--source', 'stdlib', '--vocab_size', '300', '--out', '']),
            (main.main, ['--config', 'configs/quickstart.py', '--workdir', '']),
        ],
    )
    def test_empty_ones(self, capsys, monkeypatch, command, words):
        monkeypatch.chdir(pathlib.Path(__file__).parents[2])
        assert command(words) == 2
        assert f'{words[-2]} is empty' in capsys.readouterr().err

    @pytest.mark.slow
    def test_every_character_that_is_taken_works(self, tmp_path):
        """With orbax itself: a newer one may look elsewhere for more of them."""
        names = [f'd{chr(i)}' for i in range(1, 128) if chr(i) != '/']
        for name in (*names, 'é', 'e\u0301', '\u202e', '...', '%41', '{a,b}', 'a:', 'file:', 'a' * 255):
            folder = tmp_path / name / 'w'
            try:
                files.for_arrays(folder, '')
            except UsageError:
                continue
            kept = checkpoint.Checkpoints(folder)
            kept.save(1, STATE, {'config': {}})
            kept.close()
            checkpoint.read_params(folder / '1')
            assert (folder / '1/state').is_dir(), name


class TestPlaces:
    def test_a_link_stays_one(self, tmp_path):
        (tmp_path / 'link').symlink_to('far/away')
        assert outputs.resolve(tmp_path / 'link') == tmp_path / 'far/away'
        with outputs.replacing(outputs.resolve(tmp_path / 'link'), lambda out: None) as new:
            new.mkdir()
        assert (tmp_path / 'link').is_symlink() and (tmp_path / 'far/away').is_dir()

    def test_what_belongs_to_a_run(self, tmp_path):
        run = make_run(tmp_path / 'run')
        (tmp_path / 'link').symlink_to(run / 'tokenizer')
        own = ('tokenizer', 'checkpoints/7', 'debug/x/y', 'frozen/x', 'samples/60.jsonl', 'profile')
        for place in (*(run / name for name in own), tmp_path / 'link/a.json'):
            with pytest.raises(UsageError, match=f'belongs to {run}'):
                outputs.resolve(place)
        assert outputs.resolve(run / 'analysis/angular') and outputs.resolve(run / 'exported')

    def test_a_work_directory_of_something_else(self, tmp_path):
        others = {'config.json': '{"model_type": "llama"}', 'metrics.jsonl': '{"step": 1, "acc": 0.1}\n'}
        for name in ('metrics.jsonl', 'tokenizer/a', 'environment.json', 'debug/report.json', 'profile/mine'):
            others.setdefault(name, '')
        for name, body in others.items():
            folder = tmp_path / name[:3]
            (folder / name).parent.mkdir(parents=True)
            (folder / name).write_text(body)
            with pytest.raises(UsageError, match=f'holds {name} of something else'), workdir.open_workdir(folder, {}):
                pass
            assert [path.name for path in folder.iterdir()] == [name.partition('/')[0]]

    def test_files_that_no_run_writes_do_no_harm(self, tmp_path):
        (tmp_path / 'thesis').write_text('mine')
        with workdir.open_workdir(tmp_path, configs.public(configs.Config())):
            pass
        assert (tmp_path / 'thesis').read_text() == 'mine'

    @pytest.mark.parametrize(
        'process, error, told', [(0, TypeError, 'is missing'), (1, TypeError, 'mine'), (1, OSError, 'is missing')]
    )
    def test_a_folder_that_is_gone(self, tmp_path, monkeypatch, process, error, told):
        """Process 0 may have removed it after an error of all, which the others then tell as it is."""
        monkeypatch.setattr(jax, 'process_index', lambda: process)
        resolved = configs.public(configs.Config())
        with pytest.raises((UsageError, error), match=told), workdir.open_workdir(tmp_path / 'run', resolved) as run:
            run.joinpath('.lock').unlink(missing_ok=True)
            run.rmdir()
            raise error('mine')

    @pytest.mark.parametrize('make', [lambda path: path.symlink_to('mine'), os.mkfifo, pathlib.Path.mkdir])
    def test_a_lock_that_is_no_file(self, tmp_path, make):
        (tmp_path / 'mine').write_text('mine')
        make(tmp_path / '.lock')
        with pytest.raises(UsageError, match='lock is not a file'), outputs.locked(tmp_path / '.lock', 'busy'):
            pass
        assert (tmp_path / 'mine').read_text() == 'mine' and os.path.lexists(tmp_path / '.lock')

    @pytest.mark.parametrize('where', ['file/a.json', 'loop', '/proc/self/a.json'])
    def test_a_file_that_cannot_be_written_is_refused_first(self, tmp_path, monkeypatch, where):
        monkeypatch.chdir(tmp_path)
        (tmp_path / 'file').write_text('mine')
        (tmp_path / 'loop').symlink_to('loop')
        with pytest.raises(UsageError, match='--out .* cannot be written: '), outputs.writing(outputs.resolve(where)):
            pass
        assert sorted(os.listdir(tmp_path)) == ['file', 'loop']

    def test_a_file_is_written_by_one_at_a_time(self, tmp_path):
        path = tmp_path / 'new/a.json'
        with outputs.writing(path), pytest.raises(UsageError, match='is writing it'), outputs.writing(path):
            pass
        assert not list((tmp_path / 'new').iterdir())

    def test_prepare_keeps_out_of_a_run(self, tmp_path):
        run = make_run(tmp_path / 'run')
        before = tree(run)
        with pytest.raises(UsageError, match='holds a file that no preparation has made: checkpoints'):
            jobs.Job(None, 'tokens', '', str(run), None, 8, None, 0).check_plan([])
        assert tree(run) == before

    @pytest.mark.parametrize('name', ['tokenizer.json', 'merges.txt', 'notes'])
    def test_a_tokenizer_of_somebody_else(self, tmp_path, name):
        (tmp_path / name).write_text('{"added_tokens": [{"content": "<s>"}]}')
        for out in (tmp_path, tmp_path / name):
            with pytest.raises(UsageError, match=f'--out {out}(: not a tokenizer of|.* not write)'):
                train_tokenizer._check_replaceable(out)

    def test_files_of_somebody_else(self, tmp_path, capsys):
        (mine := tmp_path / 'config.json').write_text('{"model": 1}')
        assert evaluate.main(['--checkpoint', str(tmp_path), '--out', str(mine)]) == 2
        assert 'holds no results of an evaluation' in capsys.readouterr().err
        assert evaluate._place(tmp_path / 'new.json') == tmp_path / 'new.json'


def test_a_lock_file_that_its_owner_has_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """Else two processes could have the lock of one name: one of the old file, one of the new."""
    path, original, calls = tmp_path / 'lock', fcntl.flock, []

    def slow(file, how):
        calls.append(how)
        if len(calls) == 1:
            path.unlink()  # between opening and locking it
        original(file, how)

    monkeypatch.setattr(fcntl, 'flock', slow)
    with outputs.locked(path, 'busy'):
        assert len(calls) == 2 and path.exists()
        with pytest.raises(UsageError, match='busy'), outputs.locked(path, 'busy'):
            pass


class TestReplacing:
    def test_two_at_once(self, tmp_path):
        out, inside, done = tmp_path / 'out', threading.Event(), threading.Event()

        def first():
            with outputs.replacing(out, lambda out: None) as new:
                new.mkdir()
                (new / 'a').write_text('first')
                inside.set()
                done.wait(10)

        thread = threading.Thread(target=first)
        thread.start()
        inside.wait(10)
        with pytest.raises(UsageError, match='is writing it'), outputs.replacing(out, lambda out: None):
            pass
        done.set()
        thread.join()
        assert tree(tmp_path) == {'out': False, 'out/a': b'first'}

    def test_names_of_somebody_else_stay(self, tmp_path):
        for name in ('.out.new', '.out.old', '.out.mixln_jax-mine', '.out.lock'):
            (tmp_path / name).mkdir()
        for _ in range(2):
            with outputs.replacing(tmp_path / 'out', lambda out: None) as new:
                new.mkdir()
        assert sorted(tree(tmp_path)) == ['.out.lock', '.out.mixln_jax-mine', '.out.new', '.out.old', 'out']

    def test_what_kills_have_left(self, tmp_path):
        """Between the two renames of a kill the old one had lost its name: it gets it back."""
        for name in ('.out.mixln_jax-00000000', '.out.mixln_jax-11111111-old'):
            (tmp_path / name).mkdir()
            (tmp_path / name / name[-3:]).touch()
        (tmp_path / '.out.mixln_jax-lock').touch()
        with pytest.raises(ZeroDivisionError), outputs.replacing(tmp_path / 'out', lambda out: None) as new:
            new.mkdir()
            raise ZeroDivisionError
        assert sorted(tree(tmp_path)) == ['out', 'out/old']

    def test_what_comes_while_it_writes_stays(self, tmp_path):
        (out := tmp_path / 'out').mkdir()

        def check(out):
            if any(out.iterdir()):
                raise UsageError('not ours')

        with pytest.raises(UsageError, match='not ours'), outputs.replacing(out, check) as new:
            new.mkdir()
            (out / 'thesis').touch()
        assert sorted(tree(tmp_path)) == ['out', 'out/thesis']

    def test_a_start_that_fails_leaves_no_folder(self, tmp_path):
        with pytest.raises(ZeroDivisionError), outputs.writing_into(tmp_path / 'a/b'):
            raise ZeroDivisionError
        assert not list(tmp_path.iterdir())


class TestTemporaryFiles:
    CODE = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from mixln_jax.system import outputs
def replace(*_):
    print('there', flush=True)
    sys.stdin.read()
outputs.os.replace = replace
outputs.write(sys.argv[1], b'half')
"""

    def test_of_a_killed_process_they_go_and_of_a_living_one_stay(self, tmp_path):
        path, root = tmp_path / 'a.json', str(pathlib.Path(__file__).parents[2])
        words = [sys.executable, '-c', self.CODE, str(path), root]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout.readline() == b'there\n'
            [left] = os.listdir(tmp_path)
            (tmp_path / '.b.json.1.123456789').touch()
            (tmp_path / '.a.json.1.123456789').symlink_to('a.json')
            outputs.write(path, b'whole')
            assert left in os.listdir(tmp_path)
            other.kill()
            other.wait()
        outputs.write(path, b'whole')
        assert sorted(os.listdir(tmp_path)) == ['.a.json.1.123456789', '.b.json.1.123456789', 'a.json']

    def test_what_a_link_leads_to_is_written(self, tmp_path):
        (tmp_path / 'far').mkdir()
        (tmp_path / 'a').symlink_to('b')
        (tmp_path / 'b').symlink_to('far/c')
        for body in (b'one', b'two'):
            outputs.write(tmp_path / 'a', body)
            assert (tmp_path / 'far/c').read_bytes() == body and (tmp_path / 'a').is_symlink()
        (tmp_path / 'loop').symlink_to('loop')
        with pytest.raises(UsageError, match='loop is a link that leads to itself'):
            outputs.write(tmp_path / 'loop', b'')

    def test_many_threads_write_one_file(self, tmp_path):
        threads = [
            threading.Thread(target=lambda i=i: [outputs.write(tmp_path / 'a', b'%d' % i * 99) for _ in range(20)])
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert os.listdir(tmp_path) == ['a'] and len({*(tmp_path / 'a').read_bytes()}) == 1


class TestFigures:
    def test_only_its_own_go(self, tmp_path, capsys):
        """result.json may name anything: a figure of an earlier analysis, and files of the user's."""
        (folder := tmp_path / 'a').mkdir()
        for name in ('old', '../outside'):
            figures.save(Figure(), folder, name)
        for name in ('mine.png', 'mine.svg'):
            (folder / name).write_text('mine')
        (folder / 'link.svg').symlink_to('old.svg')
        (folder / 'link.png').symlink_to('old.png')
        listed = ['old', 'mine', 'link', '../outside', f'{tmp_path}/outside', '..', '', 3, None, ['old']]
        (folder / 'result.json').write_text(json.dumps({'job': 'angular', 'figures': listed}))
        stand_in = types.SimpleNamespace(NAME='angular', draw=lambda results: {'angular': Figure()})
        command._check_free(stand_in, folder)
        command._draw(stand_in, folder, [])
        kept = ['angular.png', 'angular.svg', 'link.png', 'link.svg', 'mine.png', 'mine.svg', 'result.json']
        assert sorted(os.listdir(folder)) == kept and (tmp_path / 'outside.svg').exists()
        stand_in.draw = lambda results: {'mine': Figure()}
        with pytest.raises(UsageError, match='mine.png or .svg there is no figure of ours'):
            command._draw(stand_in, folder, [])
        assert (folder / 'mine.svg').read_text() == 'mine'


@pytest.mark.parametrize(
    'name', ['a|b<script>', '[x](http://y)', '![x](y)', '`a', '# a', '1. a', 'www.a.b', '_a_', 'a\n# b']
)
def test_markdown_shows_names_as_they_are(name):
    shown = pytest.importorskip('markdown_it').MarkdownIt('gfm-like', {'linkify': False})
    text = markdown.document(name, f'{name} is it.', [page.Section(name, notes=(f'{name}: `code`',))])
    tokens = [token for part in shown.parse(text) for token in (part, *(part.children or ()))]
    assert {token.type for token in tokens} <= {
        *('heading_open', 'heading_close', 'paragraph_open', 'paragraph_close', 'inline', 'text', 'code_inline'),
        *('text_special', 'softbreak'),
    }
    said = [''.join(t.content for t in token.children) for token in tokens if token.type == 'inline']
    assert said[0] == ' '.join(name.split()) and len([token for token in tokens if token.type == 'heading_open']) == 2


class TestReadersOfRunsInTraining:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        """A run whose newest checkpoint is 1, and where a newer one takes its place while 1 is read."""
        monkeypatch.setattr(time, 'sleep', lambda seconds: None)
        for module in (checkpoint, checkpoint_folders):
            monkeypatch.setattr(module, 'is_complete', lambda folder: folder.is_dir())
        make_run(tmp_path).joinpath('checkpoints/5').rename(tmp_path / 'checkpoints/1')
        return tmp_path

    @staticmethod
    def read(folder):
        if folder.name == '1':
            folder.rename(folder.with_name('2'))
            raise CheckpointError('half gone')
        return ('read',)

    def test_they_take_the_newer_one(self, folder):
        assert weights.read_newest(folder, self.read) == (folder / 'checkpoints/2', 'read')

    def test_a_single_one_is_not_called_damaged(self, folder):
        with pytest.raises(weights.Removed, match='checkpoints/1 was removed while it was read'):
            weights.read_newest(folder / 'checkpoints/1', self.read)

    def test_damage_stays_damage(self, folder):
        def read(folder):
            raise CheckpointError('its JSON has changed')

        (folder / 'checkpoints/2').mkdir()
        for path in (folder, folder / 'checkpoints/1'):
            with pytest.raises(CheckpointError, match='its JSON has changed'):
                weights.read_newest(path, read)


def test_the_last_save_is_read_back(tmp_path):
    kept = checkpoint.Checkpoints(tmp_path / 'checkpoints')
    kept.save(1, STATE, {'config': {}})
    kept.wait()
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), STATE)
    kept.read_back(1, like)
    for path in (tmp_path / 'checkpoints/1/state').rglob('d/*'):
        path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(CheckpointError, match='the last save cannot be read back: .*checkpoints/1: '):
        kept.read_back(1, like)
    kept.close()
    assert errors.to_exit(CheckpointError('')).code == 5
