"""Checksums, damaged checkpoints, and what is never saved."""

import contextlib
import errno
import functools
import json
import os
import pathlib
import pwd
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.distributed import mesh as meshes
from mixln_jax.runs import checkpoint, checkpoint_folders, checksums, weights
from mixln_jax.system.errors import CheckpointError, NumericsError, UsageError


def state_of(seed=0):
    rng = np.random.default_rng(seed)
    return {
        'step': jnp.int32(3),
        'params': {'kernel': jnp.asarray(rng.normal(size=(64, 48)), jnp.float32)},
        'half': jnp.asarray(rng.normal(size=(16, 5, 3)), jnp.bfloat16),
        'moments': {'nu': jnp.asarray(rng.normal(size=(64, 48)) ** 2, jnp.float32)},
    }


def like(state, sharding=None):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints 3 and 5 of different states."""
    checkpoints = checkpoint.Checkpoints(tmp_path / 'checkpoints')
    for step in (3, 5):
        checkpoints.save(step, state_of(step), {'tokens': 10 * step})
    checkpoints.close()
    return tmp_path / 'checkpoints'


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize('name', ['1000/thesis.txt', '2024/a/b', '\u0663/x', '7/state.txt', '77', '5/mine'])
def test_nothing_of_anybody_else_is_removed(saved, name):
    """Under the name of a checkpoint, whole or not."""
    path = saved / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('mine')
    with pytest.raises(UsageError, match='is not a checkpoint of this run: move it'):
        checkpoint.Checkpoints(saved)
    assert path.read_text() == 'mine'


def test_what_a_kill_left_goes(saved):
    for name in ('7/state.orbax-checkpoint-tmp-12/d/x', '8/_CHECKPOINT_METADATA', '9/about/metadata'):
        (saved / name).parent.mkdir(parents=True)
        (saved / name).write_text('{"commit_timestamp_nsecs": null}')
    (saved / '10').mkdir()
    assert checkpoint.Checkpoints(saved).latest() == 5 and checkpoint_folders.steps(saved) == [3, 5]
    assert not [name for name in ('7', '8', '9', '10') if (saved / name).exists()]


@pytest.mark.parametrize('name', ['about/metadata', 'state/manifest.ocdbt', 'state/_METADATA'])
@pytest.mark.parametrize('make', [os.mkfifo, lambda path: path.symlink_to('/dev/zero')])
def test_pipes_and_devices_hold_up_no_reader(saved, name, make):
    (saved / '5' / name).unlink()
    make(saved / '5' / name)
    with pytest.raises(CheckpointError, match='neither a file nor a folder'):
        checkpoint.read_params(saved / '5')
    assert checkpoint.Checkpoints(saved).restore(like(state_of()))[1]['step'] == 3
    assert (saved / '5.corrupt').is_dir()


def test_round_trip(saved):
    state, about = checkpoint.Checkpoints(saved).restore(like(state_of()))
    assert_equal(state, state_of(5))
    assert (about['step'], about['tokens']) == (5, 50)
    assert about['leaves']['half'] | {'checksum': 0} == {'dtype': 'bfloat16', 'shape': [16, 5, 3], 'checksum': 0}
    assert {'python', 'jax', 'orbax-checkpoint'} <= set(about['versions'])


def test_nothing_there(tmp_path):
    assert checkpoint.Checkpoints(tmp_path / 'none').restore(like(state_of())) is None


def array_files(folder):
    """The files with array data, largest first."""
    files = [path for path in (folder / 'state').rglob('*') if path.is_file() and '/d/' in str(path)]
    assert files
    return sorted(files, key=lambda path: -path.stat().st_size)


def files_of(folder):
    return sorted(path for path in folder.rglob('*') if path.is_file())


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    file.write_bytes(content)


@pytest.mark.parametrize('where', [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_flipped_byte_is_named_and_the_step_before_taken(saved, where, capsys):
    file = array_files(saved / '5')[0]
    flip(file, int(where * file.stat().st_size))
    state, about = checkpoint.Checkpoints(saved).restore(like(state_of()))
    assert about['step'] == 3
    assert_equal(state, state_of(3))
    assert 'is damaged' in (out := capsys.readouterr().err) and str(saved / '5') in out
    assert (saved / '5.corrupt').is_dir() and not (saved / '5').exists()
    assert checkpoint.Checkpoints(saved).latest() == 3


def test_no_flipped_byte_anywhere_gives_wrong_values(saved, tmp_path):
    """Some bytes (superseded index nodes) carry nothing: then the values are right, else the step before is taken."""
    rng, taken = np.random.default_rng(0), []
    for number, file in enumerate(sorted(path for path in (saved / '5').rglob('*') if path.is_file())):
        copy = pathlib.Path(shutil.copytree(saved, tmp_path / f'copy{number}'))
        flip(copy / file.relative_to(saved), rng.integers(file.stat().st_size))
        state, about = checkpoint.Checkpoints(copy).restore(like(state_of()))
        taken.append(about['step'])
        assert_equal(state, state_of(about['step']))
    assert 3 in taken


def with_leaf(state, name, change):
    """The state with one leaf changed."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: change(leaf) if trees.path_name(path) == name else leaf, state
    )


def next_float(leaf):
    """The leaf with the smallest change of one value that there is."""
    bits = np.asarray(leaf).view(f'uint{8 * leaf.dtype.itemsize}').copy()
    bits[(7,) * leaf.ndim if leaf.ndim < 3 else (7, 2, 1)] ^= 1
    return jnp.asarray(bits.view(leaf.dtype))


def exchange_arrays(saved, state):
    """Puts the arrays of `state` into checkpoint 5: files that decode well and still are not what was saved."""
    other = saved.parent / 'other'
    checkpoints = checkpoint.Checkpoints(other)
    checkpoints.save(5, state, {})
    checkpoints.close()
    shutil.rmtree(saved / '5/state')
    shutil.copytree(other / '5/state', saved / '5/state')


@pytest.mark.parametrize('name', ['params/kernel', 'half', 'moments/nu'])
def test_a_changed_value_is_named_by_its_leaf(saved, name, capsys):
    exchange_arrays(saved, with_leaf(state_of(5), name, next_float))
    _, about = checkpoint.Checkpoints(saved).restore(like(state_of()))
    assert about['step'] == 3
    assert f'checksum of {name} does not match' in capsys.readouterr().err


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_weights_alone_are_checked_too(tmp_path, dtype):
    """By who reads no moments; these may be what they like."""
    state = jax.tree.map(lambda leaf: leaf.astype(dtype), state_of(5))
    checkpoints = checkpoint.Checkpoints(tmp_path / 'saved')
    checkpoints.save(5, state, {})
    checkpoints.close()
    exchange_arrays(tmp_path / 'saved', with_leaf(state, 'moments/nu', next_float))
    assert_equal(checkpoint.read_params(tmp_path / 'saved/5')[0], state['params'])
    shutil.rmtree(tmp_path / 'other')
    exchange_arrays(tmp_path / 'saved', with_leaf(state, 'params/kernel', next_float))
    with pytest.raises(CheckpointError, match='5: checksum of params/kernel does not match'):
        checkpoint.read_params(tmp_path / 'saved/5')


@pytest.mark.parametrize('item', ['about', 'state'])
def test_missing_files_take_the_step_before(saved, item):
    for path in (saved / '5' / item).rglob('*'):
        if path.is_file():
            path.unlink()
    assert checkpoint.Checkpoints(saved).restore(like(state_of()))[1]['step'] == 3


def test_changed_json_is_damage_too(saved):
    path = saved / '5' / 'about' / 'metadata'
    path.write_text(path.read_text().replace('64', '65'))
    assert checkpoint.Checkpoints(saved).restore(like(state_of()))[1]['step'] == 3


def unreadable(monkeypatch, error, *steps):
    """Lets the file system fail where the JSON of these steps is read."""
    original = checkpoint.Checkpoints.about

    def fail(self, step):
        if step in steps:
            error.filename = f'{step}/about/metadata'
            raise error
        return original(self, step)

    monkeypatch.setattr(checkpoint.Checkpoints, 'about', fail)


@pytest.mark.parametrize('number', [errno.EIO, errno.EMFILE, errno.EACCES, errno.ENOMEM, errno.ESTALE])
def test_one_that_the_file_system_does_not_give(saved, monkeypatch, capsys, number):
    unreadable(monkeypatch, OSError(number, os.strerror(number)), 5)
    assert checkpoint.Checkpoints(saved).restore(like(state_of()))[1]['step'] == 3
    assert os.strerror(number) in (said := capsys.readouterr().err) and '5/about/metadata' in said
    assert {path.name for path in saved.iterdir()} == {'3', '5.unreadable'}


def test_one_that_tensorstore_is_not_given(saved, monkeypatch):
    unreadable(monkeypatch, ValueError('PERMISSION_DENIED: Error opening "x" [OS error 13]'), 5)
    assert checkpoint.Checkpoints(saved).restore(like(state_of()))[1]['step'] == 3
    assert {path.name for path in saved.iterdir()} == {'3', '5.unreadable'}


def test_a_file_system_that_gives_nothing_renames_nothing(saved, monkeypatch):
    unreadable(monkeypatch, OSError(errno.EIO, 'Input/output error'), 3, 5)
    with pytest.raises(CheckpointError, match='5: OSError.*Input/output error.*; 3: OSError'):
        checkpoint.Checkpoints(saved).restore(like(state_of()))
    assert (saved / '5').is_dir() and (saved / '3').is_dir()


@pytest.mark.parametrize('left', [None, b'', b'{}', b'{"commit_timestamp_nsecs": nul', b'[' * 100_000])
def test_its_time_may_be_lost_and_its_owner_have_no_name(saved, monkeypatch, left):
    """As in a container with a user id of its own: whoever asks for the name has a KeyError."""
    (saved / '5' / checkpoint_folders.METADATA).unlink()
    if left is not None:
        (saved / '5' / checkpoint_folders.METADATA).write_bytes(left)

    def unknown(number):
        raise KeyError(f'getpwuid(): uid not found: {number}')

    monkeypatch.setattr(pwd, 'getpwuid', unknown)
    checkpoints = checkpoint.Checkpoints(saved)
    assert checkpoints.restore(like(state_of()))[1]['step'] == 5
    checkpoints.save(6, state_of(), {})
    checkpoints.close()
    assert checkpoint.Checkpoints(saved).latest() == 6


def test_another_step_under_its_name_is_named_by_every_reader(saved):
    shutil.copytree(saved / '3', saved / '7')
    assert checkpoint.Checkpoints(saved).restore(like(state_of()))[1]['step'] == 5
    assert (saved / '7.corrupt').is_dir()
    shutil.copytree(saved / '3', saved / '7')
    for read in (checkpoint.read_params, lambda path: checkpoint.Checkpoints(saved).read(7, like(state_of()))):
        with pytest.raises(CheckpointError, match='7: it is step 3'):
            read(saved / '7')


def test_no_good_step(saved):
    for step in ('3', '5'):
        file = array_files(saved / step)[0]
        file.write_bytes(b'nonsense')
    with pytest.raises(CheckpointError, match='no checkpoint is readable'):
        checkpoint.Checkpoints(saved).restore(like(state_of()))
    assert not (saved / '3').exists()
    with pytest.raises(CheckpointError, match=r'there are only damaged checkpoints .*3\.corrupt'):  # nor from scratch
        checkpoint.Checkpoints(saved).restore(like(state_of()))


def test_a_renamed_step_is_not_taken_for_another(saved):
    (saved / '5').rename(saved / '50')
    assert checkpoint.Checkpoints(saved).restore(like(state_of()))[1]['step'] == 3


def test_another_structure_is_refused_and_nothing_renamed(saved):
    expected = like(state_of())
    expected['params']['kernel'] = jax.ShapeDtypeStruct((64, 47), jnp.float32)
    with pytest.raises(CheckpointError, match=r'params/kernel is .*48.* needs .*47'):
        checkpoint.Checkpoints(saved).restore(expected)
    expected = like(state_of()) | {'more': jax.ShapeDtypeStruct((2,), jnp.float32)}
    with pytest.raises(CheckpointError, match='more is missing'):
        checkpoint.Checkpoints(saved).restore(expected)
    assert pathlib.Path(saved, '5').is_dir()


@pytest.mark.parametrize('name', ['params/kernel', 'half', 'moments/nu'])
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_never_saved(saved, value, name):
    state = with_leaf(state_of(), name, lambda leaf: leaf.at[(-1,) * leaf.ndim].set(value))
    checkpoints = checkpoint.Checkpoints(saved)
    with pytest.raises(NumericsError, match=f'step 7: {name} is not finite'):
        checkpoints.save(7, state, {})
    checkpoints.close()
    assert checkpoint.Checkpoints(saved).latest() == 5


def test_keeps_the_newest(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state_of(step), {})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ['2', '3']


@pytest.fixture
def no_folder_renames(monkeypatch):
    """What gcsfuse does: files can be renamed, folders cannot."""

    def guarded(rename):
        def of(source, *others, **more):
            if os.path.isdir(source):
                raise OSError(errno.EMFILE, 'Too many open files', source)
            return rename(source, *others, **more)

        return of

    for module, name in ((os, 'rename'), (os, 'replace'), (shutil, 'move')):
        monkeypatch.setattr(module, name, guarded(getattr(module, name)))
    with pytest.raises(OSError, match='Too many open files'):
        os.rename('/tmp', '/tmp/other')


class TestWhatIsWhole:
    def test_where_no_folder_can_be_renamed(self, no_folder_renames, saved, capsys):
        assert checkpoint_folders.steps(saved) == [3, 5]
        flip(file := array_files(saved / '5')[0], file.stat().st_size // 2)
        damaged = {path.relative_to(saved / '5'): path.read_bytes() for path in files_of(saved / '5')}
        checkpoints = checkpoint.Checkpoints(saved)
        state, about = checkpoints.restore(like(state_of()))
        assert about['step'] == 3
        assert_equal(state, state_of(3))
        assert 'is damaged' in (out := capsys.readouterr().err) and 'now 5.corrupt' in out
        aside = {path.relative_to(saved / '5.corrupt'): path.read_bytes() for path in files_of(saved / '5.corrupt')}
        assert aside == damaged and not (saved / '5').exists()
        checkpoints.save(5, state_of(6), {})
        checkpoints.close()
        assert_equal(checkpoint.Checkpoints(saved).restore(like(state_of()))[0], state_of(6))

    def left_by_a_kill(self, folder, how):
        """Makes of a whole checkpoint what a kill leaves while it is written."""
        if how == 'renamed when whole':  # orbax's other way, which was ours
            folder.rename(folder.with_name(f'{folder.name}.orbax-checkpoint-tmp'))
            return
        (folder / 'commit_success.txt').unlink()
        if how == 'the last file is missing':
            return
        path = folder / '_CHECKPOINT_METADATA'
        time = json.loads(path.read_text())['commit_timestamp_nsecs']
        path.write_text(path.read_text().replace(str(time), 'null'))
        (folder / 'state/commit_success.txt').unlink()
        array_files(folder)[0].unlink()
        if how == 'of two parts one':
            return
        (folder / 'about/commit_success.txt').unlink()
        if how == 'empty':
            shutil.rmtree(folder)
            folder.mkdir()

    @pytest.mark.parametrize(
        'how',
        ['renamed when whole', 'the last file is missing', 'of two parts one', 'parts of arrays', 'empty'],
    )
    def test_half_written_ones_are_passed_over(self, saved, how, capsys):
        for name in ('5.corrupt', 'notes'):  # of people, and of ours: they stay
            (saved / name).mkdir()
        self.left_by_a_kill(saved / '5', how)
        assert checkpoint_folders.steps(saved) == [3]
        assert weights.checkpoint_folder(saved.parent) == saved / '3'
        with pytest.raises(CheckpointError, match='5: '):
            checkpoint.read_params(saved / '5')
        with contextlib.closing(checkpoint.Checkpoints(saved, read_only=True)):
            there = {path.name for path in saved.iterdir()}
            assert len(there) == 4  # who reads removes nothing
        checkpoints = checkpoint.Checkpoints(saved)
        aside = {'5.unfinished'} if how == 'the last file is missing' else set()  # it may have been lost
        assert {path.name for path in saved.iterdir()} == {'3', '5.corrupt', 'notes'} | aside
        said = capsys.readouterr().err
        assert (
            how == 'renamed when whole'
            or f'{saved / "5"} was not written to its end; {"now" if aside else "r"}' in said
        )
        state, about = checkpoints.restore(like(state_of()))
        assert about['step'] == checkpoints.latest() == 3 and not capsys.readouterr().err
        assert_equal(state, state_of(3))
        checkpoints.save(5, state_of(6), {})
        checkpoints.close()
        assert_equal(checkpoint.Checkpoints(saved).restore(like(state_of()))[0], state_of(6))

    def test_one_that_is_being_written_is_not_read(self, saved, monkeypatch):
        """By another process, whose training goes on."""
        written, write = [], ocp.path.atomicity.CommitFileTemporaryPath.finalize

        async def look(self):
            written.append((self.get().name, checkpoint_folders.steps(saved)))
            await write(self)

        monkeypatch.setattr(ocp.path.atomicity.CommitFileTemporaryPath, 'finalize', look)
        checkpoints = checkpoint.Checkpoints(saved)
        checkpoints.save(7, state_of(7), {})
        checkpoints.close()
        assert written and written[-1] == ('7', [3, 5]) and checkpoint_folders.steps(saved) == [3, 5, 7]

    def test_those_of_orbax_before_0_12_3(self, saved):
        """Which have no COMMITTED anywhere: read, and counted among those to keep."""
        for path in files_of(saved):
            if path.name == checkpoint_folders.COMMITTED:
                path.unlink()
        assert checkpoint_folders.steps(saved) == [3, 5]
        checkpoints = checkpoint.Checkpoints(saved, keep=2)
        state, about = checkpoints.restore(like(state_of()))
        assert about['step'] == 5
        assert_equal(state, state_of(5))
        checkpoints.save(7, state_of(7), {})
        checkpoints.close()
        assert checkpoint_folders.steps(saved) == [5, 7]
        # One whose metadata is damaged too is not taken for half written, and removed.
        flip(saved / '5/_CHECKPOINT_METADATA', 0)
        assert checkpoint.Checkpoints(saved).latest() == 7 and checkpoint_folders.steps(saved) == [5, 7]


class TestChecksum:
    @pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32'])
    def test_every_flipped_bit_shows(self, dtype):
        rng = np.random.default_rng(0)
        array = np.asarray(jnp.asarray(rng.normal(size=(7, 11, 3)) * 9, dtype))
        sum_of = jax.jit(checksums.checksum)
        before = sum_of(array)
        for _ in range(100):
            raw = bytearray(array.tobytes())
            raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
            assert sum_of(np.frombuffer(raw, array.dtype).reshape(array.shape)) != before

    def test_exchanged_elements_show(self):
        array = np.arange(20.0, dtype=np.float32).reshape(4, 5)
        assert checksums.checksum(array) != checksums.checksum(array[::-1].copy())
        assert checksums.checksum(array) != checksums.checksum(array.reshape(5, 4)[:, ::-1].copy())

    def test_the_same_on_every_mesh(self):
        array = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
        sums = set()
        for count in (1, 2, 8):
            on = meshes.make_mesh(configs.Mesh(count), meshes.devices('cpu'))
            sums.add(int(jax.jit(checksums.checksum)(jax.device_put(array, meshes.batch_sharding(on)))))
        assert len(sums) == 1

    def test_restores_onto_another_mesh(self, saved):
        state = functools.partial(state_of, 5)
        on = meshes.replicated(meshes.make_mesh(configs.Mesh(), meshes.devices('cpu')))
        restored, _ = checkpoint.Checkpoints(saved).restore(like(state(), on))
        assert len(restored['params']['kernel'].sharding.device_set) == 8
        assert_equal(jax.device_get(restored), jax.device_get(state()))
