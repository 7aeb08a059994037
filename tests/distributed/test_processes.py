"""Several processes: who they are, what they say at their end; and, slowly, real ones killed, stopped and missing."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax._src import distributed
from strangers import free_port

from mixln_jax.distributed import processes
from mixln_jax.runs import checkpoint, checkpoint_folders
from mixln_jax.system.errors import ProcessLost, UsageError

ROOT = pathlib.Path(__file__).parents[2]


class TestFind:
    @pytest.fixture(autouse=True)
    def alone(self, monkeypatch):
        for name in processes.VARIABLES:
            monkeypatch.delenv(name, raising=False)

    def ask(self, monkeypatch, *values):
        for name, value in zip(processes.VARIABLES, values, strict=True):
            monkeypatch.setenv(name, value)
        return processes.find()

    def test_by_itself(self, monkeypatch):
        assert processes.find() is None
        assert self.ask(monkeypatch, 'host:1234', '1', '0') is None

    def test_asked(self, monkeypatch):
        assert self.ask(monkeypatch, 'host:1234', '3', '2') == ('host:1234', 3, 2)

    def test_slurm(self, monkeypatch):
        for name, value in {
            'SLURM_JOB_ID': '7',
            'SLURM_STEP_NODELIST': 'node[03-04]',
            'SLURM_NTASKS': '4',
            'SLURM_PROCID': '3',
            'SLURM_LOCALID': '1',
        }.items():
            monkeypatch.setenv(name, value)
        address, count, number = processes.find()
        assert address.startswith('node03:') and (count, number) == (4, 3)

    def test_open_mpi(self, monkeypatch):
        uri = '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911'
        for name, value in {
            'OMPI_MCA_orte_hnp_uri': uri,
            'OMPI_COMM_WORLD_SIZE': '2',
            'OMPI_COMM_WORLD_RANK': '1',
        }.items():
            monkeypatch.setenv(name, value)
        address, count, number = processes.find()
        assert address.startswith('10.96.0.1:') and (count, number) == (2, 1)

    @pytest.mark.parametrize(
        'values', [('host:1234', '2', '2'), ('host', '2', '1'), ('host:99999', '2', '1'), ('host:1', 'two', '1')]
    )
    def test_values_without_sense(self, monkeypatch, values):
        with pytest.raises(UsageError, match='JAX_COORDINATOR_ADDRESS=.* is not host:port, a count and a number'):
            self.ask(monkeypatch, *values)

    def test_open_mpi_5_does_not_say_where(self, monkeypatch):
        monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '2')
        with pytest.raises(UsageError, match='set JAX_COORDINATOR_ADDRESS'):
            processes.find()

    def test_some_of_them(self, monkeypatch):
        with pytest.raises(
            UsageError, match='JAX_NUM_PROCESSES is set, .*JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID is not'
        ):
            self.ask(monkeypatch, '', '2', '')


SRUN = {'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'node[03-04]', 'SLURM_NTASKS': '2', 'SLURM_PROCID': '1'}
EIGHT = {'CUDA_VISIBLE_DEVICES': '0,1,2,3,4,5,6,7', 'SLURM_GPUS_ON_NODE': '8'}


def srun(tasks, local, node=0):
    return SRUN | {'SLURM_STEP_TASKS_PER_NODE': tasks, 'SLURM_LOCALID': str(local), 'SLURM_NODEID': str(node)}


class TestLocalDevices:
    @pytest.fixture(autouse=True)
    def alone(self, monkeypatch):
        for name in list(os.environ):
            if name.startswith(('SLURM_', 'OMPI_', 'JAX_LOCAL', *processes.VARIABLES)) or 'VISIBLE_DEVICES' in name:
                monkeypatch.delenv(name)

    @pytest.mark.parametrize(
        'given, expected',
        [
            ({}, None),
            (EIGHT, None),
            (srun('1(x2)', 0) | EIGHT, None),  # one task a node takes all
            (srun('1', 0), None),
            (SRUN | EIGHT | {'SLURM_LOCALID': '0', 'SLURM_NTASKS_PER_NODE': '1'}, None),
            (SRUN | EIGHT | {'SLURM_LOCALID': '0', 'SLURM_TASKS_PER_NODE': '1(x2)'}, None),
            (srun('8(x2)', 5) | EIGHT, [5]),
            (srun('2(x2)', 1) | EIGHT, [4, 5, 6, 7]),
            (srun('4,2', 1, node=0) | EIGHT, [2, 3]),
            (srun('4,2', 1, node=1) | EIGHT, [4, 5, 6, 7]),
            (srun('2(x3),1', 0, node=3) | EIGHT, None),
            (srun('4(x2)', 2) | {'CUDA_VISIBLE_DEVICES': '3,2,1,0'}, [2]),  # places among them, not their names
            (srun('4', 3) | {'ROCR_VISIBLE_DEVICES': '0,1,2,3'}, [3]),
            (srun('4', 3) | {'SLURM_GPUS_ON_NODE': '4'}, [3]),
            (srun('4', 3), [3]),  # nothing says how many there are: as JAX does it
            (srun('4', 3) | EIGHT | {'CUDA_VISIBLE_DEVICES': '0,1'}, None),  # --gpus-per-task=2
            (srun('2', 1) | EIGHT | {'CUDA_VISIBLE_DEVICES': '0,1,2,3'}, None),  # --gpus-per-task=4
            (srun('2', 1) | EIGHT | {'JAX_LOCAL_DEVICE_IDS': '6,7'}, None),  # which JAX reads
            # In the batch script itself SLURM's numbers are of the job; launch/local_processes.sh has shared them out.
            (EIGHT | {'SLURM_JOB_ID': '7', 'SLURM_LOCALID': '0', 'SLURM_TASKS_PER_NODE': '8'}, None),
            (EIGHT | {'OMPI_COMM_WORLD_LOCAL_SIZE': '1', 'OMPI_COMM_WORLD_LOCAL_RANK': '0'}, None),
            (EIGHT | {'OMPI_COMM_WORLD_LOCAL_SIZE': '4', 'OMPI_COMM_WORLD_LOCAL_RANK': '3'}, [6, 7]),
            (srun('1(x2)', 0) | {'OMPI_COMM_WORLD_LOCAL_SIZE': '8', 'OMPI_COMM_WORLD_LOCAL_RANK': '3'} | EIGHT, [3]),
        ],
    )  # fmt: skip
    def test_whose_they_are(self, monkeypatch, given, expected):
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        assert processes.local_device_ids() == expected

    def test_those_that_cannot_be_shared(self, monkeypatch):
        for name, value in (srun('3', 1) | EIGHT).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UsageError, match='3 processes on this node cannot share its 8 GPUs evenly: .*--ntasks-per'):
            processes.local_device_ids()

    @pytest.mark.parametrize('tasks, expected', [('1(x2)', 'all'), ('2', '4,5,6,7')])
    def test_what_jax_is_told(self, monkeypatch, tasks, expected):
        """By JAX's own start, up to where it would connect."""
        for name, value in (srun(tasks, int(tasks == '2')) | EIGHT).items():
            monkeypatch.setenv(name, value)
        told = {'jax_cuda_visible_devices': 'all'}
        for config in (jax.config, distributed.config):
            monkeypatch.setattr(config, 'update', lambda name, value: told.update({name: value}))
        monkeypatch.setattr(distributed, 'global_state', distributed.State())
        monkeypatch.setattr(distributed.xla_bridge, 'backends_are_initialized', lambda: False)  # by other tests
        monkeypatch.setattr(processes, 'roll_call', lambda *_: {})

        def connect(*others, **more):
            raise ConnectionError('as far as this goes')

        monkeypatch.setattr(distributed._jax, 'get_distributed_runtime_client', connect)
        with pytest.raises(ProcessLost, match='as far as this goes'), processes.joined(1.0, 'digest'):
            pass
        assert told['jax_cuda_visible_devices'] == expected


class TestBetweenProcesses:
    """What another process says when it ends, and in which pieces."""

    TEXT = 'process 1: config.data.path: there is no file ' + './' * 700

    def ended(self, monkeypatch, *pieces, number=0):
        """(exit code, what the third process, connected to this one, hears) after `pieces` from another."""
        codes = []
        monkeypatch.setattr(processes, 'end', codes.append)
        monkeypatch.setattr(processes, 'LAST', 0.05)
        (mine, theirs), (other, third) = socket.socketpair(), socket.socketpair()
        with mine, theirs, other, third:
            third.settimeout(1)
            peers, ending = {1 - number: mine} | ({2: other} if not number else {}), threading.Event()
            ending.wait = lambda seconds: None  # for an error of its own
            watching = threading.Thread(target=processes._watch, args=(peers, 'process here', ending), daemon=True)
            watching.start()
            for piece in pieces:
                theirs.sendall(piece)
                time.sleep(0.02)
            theirs.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + 5
            while not codes and time.monotonic() < deadline:
                time.sleep(0.005)
            ending.set()
            heard = None if number else processes._receive(third, b'')[0]
            third.close()
            theirs.close()
            watching.join()
            return codes[0], heard

    @pytest.mark.parametrize('size', [10_000, 700, 1])
    def test_a_long_error(self, monkeypatch, capsys, size):
        line = f'4 {self.TEXT}\n'.encode()
        pieces = [line[at : at + size] for at in range(0, len(line), size)] if size > 1 else [line[:1], line[1:]]
        assert self.ended(monkeypatch, *pieces) == (4, [(4, self.TEXT)])
        assert f'another one has ended: {self.TEXT}' in capsys.readouterr().err

    def test_the_first_of_several_at_once(self, monkeypatch):
        assert self.ended(monkeypatch, b'4 bad data\n8 process 1 is gone\n') == (4, [(4, 'bad data')])

    def test_what_is_sent_is_what_is_read(self, monkeypatch):
        one, other = socket.socketpair()
        with one, other:
            processes._tell({1: one}, 4, 'é\ud800 \n' * 100)
            assert processes._receive(other, b'') == ([(4, 'é\ud800 \n' * 100)], b'')

    @pytest.mark.parametrize(
        'said',
        [b'', b'4 half', b'farewell', b'[' * 3000 + b'\n', b'4\n', b'-1 x\n', b'True x\n', b'999 x\n', b'\xff\n', b'\n',
         b'9' * 5000 + b' x\n', b'9' * 20_000],
    )  # fmt: skip
    def test_no_farewell(self, monkeypatch, capsys, said):
        """A process that breaks off, or does not speak as ours do, is gone."""
        assert self.ended(monkeypatch, *([said] if said else [])) == (8, [(8, 'process 1 is gone')])
        assert 'process here: process 1 is gone; run the same command again' in capsys.readouterr().err

    def test_process_0_tells_who_is_gone(self, monkeypatch, capsys):
        assert self.ended(monkeypatch, b'8 process 2 is gone\n', number=1)[0] == 8
        assert 'process here: process 2 is gone; run the same command again' in capsys.readouterr().err


def start(workdir, count, missing=(), num_steps=30, program=('-m', 'mixln_jax.main'), **changes):
    """`count` processes that train together, without those `missing`."""
    port, keys = free_port(), {
        'num_steps': num_steps, 'batch_size': 8, 'seq_length': 16, 'log_every': 1, 'compute_dtype': 'float32',
        'device': 'cpu', 'model.num_layers': 2, 'model.hidden_size': 16, 'model.intermediate_size': 32,
        'model.num_heads': 2, 'model.vocab_size': 259, 'eval.every': 0, 'eval.tokens': 500, 'checkpoint.every': 5,
        'analysis.every': 10, 'analysis.tokens': 200,
    } | changes  # fmt: skip
    words = [f'--config.{key}={value}' for key, value in keys.items()]
    made = []
    for number in set(range(count)) - set(missing):
        environment = os.environ | {
            'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
            'JAX_NUM_PROCESSES': str(count),
            'JAX_PROCESS_ID': str(number),
            'JAX_NUM_CPU_DEVICES': str(4 // count),
        }
        made.append(
            subprocess.Popen(
                [sys.executable, *program, '--config', 'configs/quickstart.py', '--workdir', workdir, *words],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return made


def ends(started):
    """(exit codes, last lines of stderr, stdout) of all."""
    try:
        said = [process.communicate(timeout=200) for process in started]
    finally:
        for process in started:  # none is left where one of them hangs
            process.kill()
    print(*(errors for _, errors in said), sep='\n\n')  # shown where a test fails
    mine = [[line for line in errors.splitlines() if line.startswith('mixln_jax')] for _, errors in said]
    return (
        [process.returncode for process in started],
        [(lines or [''])[-1] for lines in mine],
        [out for out, _ in said],
    )


def lines_of(workdir):
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith('perf/')} for line in lines]


def until_step(started, workdir, step):
    deadline = time.monotonic() + 120
    while True:
        try:
            if lines_of(workdir)[-1]['step'] >= step:
                return
        except (OSError, ValueError, IndexError):
            pass
        assert time.monotonic() < deadline and all(process.poll() is None for process in started), ends(started)
        time.sleep(0.02)


def weights_of(workdir, step):
    return jax.tree.leaves(checkpoint.read_params(workdir / f'checkpoints/{step}')[0])


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """Undisturbed runs by number of processes."""
    made = {}

    def of(count):
        if count not in made:
            made[count] = tmp_path_factory.mktemp('whole')
            codes, errors, shown = ends(start(made[count], count))
            assert codes == [0] * count, errors
            for number, text in enumerate(shown):
                assert f'process {number}/{count}, {4 // count} local of 4 devices' in text
            assert 'weights, metrics and configuration' in shown[0] and 'loss' not in shown[-1]
        return made[count]

    return of


@pytest.mark.slow
class TestProcesses:
    def test_killed_one_at_a_time(self, whole, tmp_path):
        """And run again: bitwise the undisturbed run; the others say who is gone."""
        for number, step in ((1, 7), (0, 13)):
            started = start(tmp_path, 2)
            until_step(started, tmp_path, step)
            started[number].send_signal(signal.SIGKILL)
            codes, errors, _ = ends(started)
            others = [code for at, code in enumerate(codes) if at != number]
            # JAX and gloo may abort in the same instant; the scripts in launch/ take that for 8, and who is
            # left may hear of that one first.
            assert codes[number] == -signal.SIGKILL and set(others) <= {8, -signal.SIGABRT}
            gone = [at for at, code in enumerate(codes) if code < 0]
            for at, code in enumerate(codes):
                said = [f'process {of} is gone; run the same command again' in errors[at] for of in gone]
                assert any(said) or code != 8
        assert ends(start(tmp_path, 2))[0] == [0, 0]
        assert lines_of(tmp_path) == lines_of(whole(2))
        for one, other in zip(weights_of(tmp_path, 30), weights_of(whole(2), 30), strict=True):
            np.testing.assert_array_equal(one, other)

    @pytest.mark.parametrize('number, by', [(0, signal.SIGTERM), (1, signal.SIGTERM), (1, signal.SIGINT)])
    def test_a_signal_to_one_stops_all_behind_the_same_step(self, tmp_path, number, by):
        started = start(tmp_path, 2, num_steps=3000)
        until_step(started, tmp_path, 7)
        started[number].send_signal(by)
        codes, errors, _ = ends(started)
        assert codes == [75, 75] and all('stopped by SIGTERM; run the same' in error for error in errors)
        last = max(int(path.name) for path in (tmp_path / 'checkpoints').glob('[0-9]*'))
        line = lines_of(tmp_path)[-1]['step']
        # Stopped in the analyses, every 10 steps, the line of that step is not complete and waits in the checkpoint.
        assert last >= 7 and (line == last or (line == last - 1 and last % 10 == 0))

    def test_one_that_never_comes_is_named(self, tmp_path):
        codes, errors, _ = ends(start(tmp_path, 3, missing=[1], **{'processes.timeout': 8.0}))
        assert codes == [8, 8]
        assert all('process 0 at 127.0.0.1:' in error and 'missing: 1 of 0 to 2' in error for error in errors)

    def test_a_checkpoint_that_one_alone_cannot_read(self, whole, tmp_path):
        """Is set aside by all, and the one before it taken."""
        started = start(tmp_path, 2)
        until_step(started, tmp_path, 12)
        started[0].send_signal(signal.SIGTERM)
        assert ends(started)[0] == [75, 75]
        last = max(int(path.name) for path in (tmp_path / 'checkpoints').glob('[0-9]*'))
        program = (
            'import os, sys; from mixln_jax import main\n'
            'from mixln_jax.distributed import processes; from mixln_jax.runs import checkpoint\n'
            'of = checkpoint.Checkpoints\n'
            'restore = of._restore_state\n'
            'def fail(self, step, *others):\n'
            f'  if step == {last} and os.environ["JAX_PROCESS_ID"] == "1": raise ValueError("a flipped byte")\n'
            '  return restore(self, step, *others)\n'
            'of._restore_state = fail\n'
            'processes.end(main.main(sys.argv[1:]))'
        )
        codes, errors, _ = ends(start(tmp_path, 2, program=('-c', program)))
        assert codes == [0, 0] and (tmp_path / f'checkpoints/{last}.corrupt').is_dir()
        assert f'{last} is damaged (another process cannot read it); now {last}.corrupt' in errors[0]
        assert 'is damaged (ValueError: a flipped byte)' in errors[1]
        assert lines_of(tmp_path) == lines_of(whole(2))

    def test_a_work_directory_of_its_own_for_each(self, tmp_path):
        """Without a check the first save waits for ever."""
        program = (
            'import os, sys; from mixln_jax import main; words = sys.argv[1:]\n'
            'from mixln_jax.distributed import processes\n'
            'words[words.index("--workdir") + 1] += os.environ["JAX_PROCESS_ID"]\n'
            'processes.end(main.main(words))'
        )
        codes, errors, _ = ends(start(tmp_path / 'of', 2, program=('-c', program)))
        assert codes == [2, 2] and all('is not one folder for all 2 processes' in error for error in errors)

    def test_process_0_decides_what_is_saved_and_kept(self, tmp_path):
        """By its clock, a minute later at each reading, and its losses; the other's clock stands, its losses fall."""
        program = (
            'import itertools, os, sys, types; from mixln_jax import main\n'
            'from mixln_jax.distributed import processes; from mixln_jax.training import feed, hooks\n'
            'number, minutes = int(os.environ["JAX_PROCESS_ID"]), itertools.count()\n'
            'clock = lambda: 0.0 if number else 60.0 * next(minutes)\n'
            'hooks.time = types.SimpleNamespace(monotonic=clock)\n'
            'values = lambda step: {"eval/loss": 30.0 - step if number else 10.0 + step, "eval/tokens": 1}\n'
            'evaluation = lambda *_: lambda state: values(int(state.step)) | {"eval/perplexity": 1.0}\n'
            'feed.Feed.evaluation, save = evaluation, hooks.Saving.__call__\n'
            'def saving(self, step, *rest, **more):\n'
            f'  open({str(tmp_path / "saved")!r} + str(number), "a").write(f"{{step}} ")\n'
            '  save(self, step, *rest, **more)\n'
            'hooks.Saving.__call__ = saving\n'
            'processes.end(main.main(sys.argv[1:]))'
        )
        changes = {'checkpoint.every': 0, 'checkpoint.minutes': 2.0, 'checkpoint.keep': 1, 'log_every': 2}
        changes |= {'checkpoint.best': 'eval/loss', 'eval.every': 5, 'analysis.tokens': 0}
        codes, errors, _ = ends(start(tmp_path / 'run', 2, num_steps=12, program=('-c', program), **changes))
        assert codes == [0, 0], errors
        assert [(tmp_path / f'saved{number}').read_text() for number in (0, 1)] == ['4 5 8 12 '] * 2
        assert checkpoint_folders.steps(tmp_path / 'run/checkpoints') == [5, 12]

    @pytest.mark.parametrize('number', [0, 1])
    def test_an_error_of_one_alone_ends_all_with_its_code(self, tmp_path, number):
        program = (
            'import os, sys; from mixln_jax import main\n'
            'from mixln_jax.distributed import processes; from mixln_jax.system import errors\n'
            'from mixln_jax.training import meter\n'
            'def fail(*_): raise errors.DataError("record 17 is bad")\n'
            f'if os.environ["JAX_PROCESS_ID"] == "{number}": meter.Meter.add = fail\n'
            'processes.end(main.main(sys.argv[1:]))'
        )
        codes, errors, _ = ends(start(tmp_path, 2, program=('-c', program)))
        assert codes == [4, 4] and errors[number] == 'mixln_jax: record 17 is bad'
        assert f'another one has ended: process {number}: record 17 is bad' in errors[1 - number]

    def test_an_error_of_all_is_told_by_each(self, tmp_path):
        (tmp_path / 'file').write_text('')
        codes, errors, _ = ends(start(tmp_path / 'file', 2))
        assert codes == [2, 2] and all('file cannot be used' in error for error in errors)

    def test_matrix_products_shared_between_processes(self, tmp_path):
        """Every process then needs every row of a batch."""
        for count, tensor in ((1, 1), (2, 4)):
            changes = {'mesh.data': 1, 'mesh.tensor': tensor, 'model.num_heads': 4}
            assert ends(start(tmp_path / str(count), count, num_steps=10, **changes))[0] == [0] * count
        for one, other in zip(lines_of(tmp_path / '1'), lines_of(tmp_path / '2'), strict=True):
            assert one['train/loss'] == pytest.approx(other['train/loss'], rel=1e-5)

    def test_they_learn_from_preferences_and_from_generated_text(self, tmp_path, monkeypatch):
        """The numbers of one process: reward network, what it rewards, references read in advance."""
        monkeypatch.setenv('PYTHONPATH', str(ROOT / 'tests'))
        pairs, prompts = tmp_path / 'pairs.jsonl', tmp_path / 'prompts.jsonl'
        words = [f'{number * 7919 % 1000}' for number in range(60)]
        pairs.write_text(''.join(f'{{"prompt": "{w}", "chosen": "a", "rejected": "b{w}"}}\n' for w in words))
        prompts.write_text(''.join(f'{{"prompt": "{word}"}}\n' for word in words))
        base = {
            'num_steps': 4, 'eval.every': 2, 'analysis.tokens': 0, 'mesh.fsdp': 2, 'data.source': 'jsonl',
            'data.template': 'plain', 'data.mode': 'pad', 'data.held_out': 0.3, 'init_from': tmp_path / 'base',
        }  # fmt: skip
        reward = base | {'task.name': 'reward', 'data.path': pairs}
        precomputed = reward | {'task.name': 'preference', 'task.preference.reference': 'precomputed'}
        online = base | {
            'task.name': 'online', 'data.path': prompts, 'task.online.max_new_tokens': 5, 'task.online.updates': 2,
            'eval.samples': 4,
        }  # fmt: skip
        jobs = {
            'reward': reward,
            'precomputed': precomputed,
            'function': online | {'task.online.reward': 'rewards:letters'},
            'network': online | {'task.online.reward': tmp_path / 'reward1'},
        }
        assert ends(start(tmp_path / 'base', 1, num_steps=2, **{'analysis.tokens': 0}))[0] == [0]
        for name, changes in jobs.items():
            for count in (1, 2):
                assert ends(start(tmp_path / f'{name}{count}', count, **changes))[0] == [0] * count
            mine, theirs = (lines_of(tmp_path / f'{name}{count}') for count in (1, 2))
            assert {line['train/grad_norm'] > 0 for line in mine} == {True}
            for one, other in zip(mine, theirs, strict=True):
                for key in ('train/loss', 'train/grad_norm', 'train/reward', 'eval/loss', 'eval/reward'):
                    if key in one:
                        assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6), (name, one['step'], key)

    def test_one_device_then_four_then_two_processes(self, tmp_path, whole):
        """One curve of losses."""
        for count, first, last in ((1, 0, 7), (1, 7, 14), (2, 14, 30)):
            changes = {'mesh.data': 1} if not first else {'mesh.fsdp': 2}
            started = start(tmp_path, count, **changes)
            if last < 30:
                until_step(started, tmp_path, last)
                started[0].send_signal(signal.SIGTERM)
            assert ends(started)[0] == [0 if last == 30 else 75] * count
        mine, theirs = lines_of(tmp_path), lines_of(whole(2))
        assert [line['step'] for line in mine] == list(range(1, 31))
        for one, other in zip(mine, theirs, strict=True):
            assert one['tokens'] == other['tokens']
            assert one['train/loss'] == pytest.approx(other['train/loss'], rel=1e-5)


def test_a_stall_shows_where_everybody_is():
    code = 'import time; from mixln_jax.distributed.processes import watch; watch(0.2); time.sleep(0.6); watch(0)'
    shown = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stderr
    assert 'Timeout' in shown and 'File "<string>", line 1 in <module>' in shown
