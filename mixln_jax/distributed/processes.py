"""Several processes that train one model: who they are, whether all are there, that all stop at the same step."""

import contextlib
import faulthandler
import os
import pathlib
import re
import selectors
import signal
import sys
import threading
import time

import jax
import numpy as np
from jax._src import clusters  # how JAX itself finds out; it has no public name
from jax.experimental import multihost_utils

from mixln_jax.distributed.rollcall import aside, roll_call, where
from mixln_jax.system import console
from mixln_jax.system.cli import call
from mixln_jax.system.errors import ProcessLost, UsageError, first_line, known, one_line
from mixln_jax.system.signals import Stop, signals

ASKED = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
SECRET = 'MIXLN_JAX_SECRET'
LEAST = 10.0  # seconds that JAX has, whatever the roll call took
LAST = 2.5  # seconds by which process 0 outlives the others
KNOWN = ('slurm', 'ompi', 'gcetpu', 'gketpu')
# Where SLURM says how many processes there are on each node, `2(x3),1`; the last, of all, is for a single node.
TASKS = ('SLURM_STEP_TASKS_PER_NODE', 'SLURM_TASKS_PER_NODE', 'SLURM_NTASKS_PER_NODE', 'SLURM_NTASKS')
ENDS = re.compile(rb'([0-9]{1,2}) (.*)')  # the exit code and the text of a process that ends
FAREWELL = 0  # the code of an end that all share
LIMIT = 16_000  # bytes of a line between processes


def find():
    """(address of process 0, number of processes, this one's number), or None for a process by itself.

    From JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID, else from what SLURM, Open MPI or a
    TPU pod say. Raises UsageError for some of the three without the others, or values that make no sense.
    """
    given = {name: os.environ[name] for name in ASKED if os.environ.get(name)}
    if given:
        if missing := [name for name in ASKED if name not in given]:
            raise UsageError(f'{", ".join(given)} is set, {", ".join(missing)} is not')
        address, *numbers = given.values()
        try:
            count, number = map(int, numbers)
            if not (0 <= number < count and 0 < int(address.rpartition(':')[2]) < 2**16):
                raise ValueError
        except ValueError:
            said = ', '.join(f'{name}={value}' for name, value in given.items())
            raise UsageError(f'{said} is not host:port, a count and a number below it') from None
    else:
        there = (env for env in clusters.ClusterEnv._cluster_types if env.name in KNOWN and env.is_env_present())
        environment = next(there, None)
        if environment is None:
            if int(os.environ.get('OMPI_COMM_WORLD_SIZE', 1)) > 1:
                raise UsageError(
                    f'this Open MPI does not say where process 0 is (version 4 does): set {", ".join(ASKED)}'
                )
            return None
        count, number = environment.get_process_count(), environment.get_process_id()
        address = environment.get_coordinator_address(60, None)
    return (address, count, number) if count > 1 else None


def _known_to_all():
    """What the processes of this run know and strangers do not: SECRET, else the scheduler's name of the job, where it
    says who they are; '' for nothing."""
    by_hand = any(os.environ.get(name) for name in ASKED)
    names = [SECRET] if by_hand else [SECRET, 'OMPI_MCA_orte_hnp_uri', 'SLURM_JOB_ID']
    return next(filter(None, map(os.environ.get, names)), '')


def _on_node():
    """(number of processes on this node, this one's number among them) as Open MPI or SLURM say; else (1, 0)."""
    given = os.environ
    if 'OMPI_COMM_WORLD_LOCAL_SIZE' in given:  # first: where SLURM started mpirun, its own numbers are of mpirun
        return int(given['OMPI_COMM_WORLD_LOCAL_SIZE']), int(given['OMPI_COMM_WORLD_LOCAL_RANK'])
    if 'SLURM_STEP_NODELIST' not in given or 'SLURM_LOCALID' not in given:  # not started by srun
        return 1, 0
    text = next((given[name] for name in TASKS if given.get(name)), '1')
    counts = [int(tasks) for tasks, nodes in re.findall(r'(\d+)(?:\(x(\d+)\))?', text) for _ in range(int(nodes or 1))]
    return counts[min(int(given.get('SLURM_NODEID', 0)), len(counts) - 1)], int(given['SLURM_LOCALID'])


def local_device_ids() -> list[int] | None:
    """Which of the GPUs that this process sees are its own; None: all, or those of JAX_LOCAL_DEVICE_IDS.

    Processes of one node that see the same GPUs share them evenly. JAX alone gives each a single GPU, however many
    there are. Raises UsageError where they cannot be shared.
    """
    count, number = _on_node()
    if count == 1 or os.environ.get('JAX_LOCAL_DEVICE_IDS'):
        return None
    visible = next(filter(None, map(os.environ.get, ('CUDA_VISIBLE_DEVICES', 'ROCR_VISIBLE_DEVICES'))), None)
    on_node = int(os.environ.get('SLURM_GPUS_ON_NODE') or 0)
    seen = len(visible.split(',')) if visible else on_node
    if not seen:
        return [number]  # as many as processes, or none
    if seen < max(count, on_node):
        return None  # SLURM shows each its own (--gpus-per-task)
    if seen % count:
        raise UsageError(
            f'{count} processes on this node cannot share its {seen} GPUs evenly: start a number that divides {seen} '
            '(--ntasks-per-node; one takes all), or set JAX_LOCAL_DEVICE_IDS'
        )
    share = seen // count
    return list(range(number * share, (number + 1) * share))


@contextlib.contextmanager
def joined(timeout: float, digest: str, secret: str = ''):
    """Joins the other processes, if there are any, before JAX does anything else. Inside, this process ends with exit 8
    as soon as another one is gone, even while it waits for that one; where another one ends with an error, with its
    exit code.

    Args:
        timeout: seconds to wait for all.
        digest: of what has to be the same in every process.
        secret: what only they know; empty: what SECRET or the scheduler says.

    Raises ProcessLost where some do not come within `timeout`, naming them; UsageError where one is different.
    """
    found = find()
    if not found:
        yield
        return
    (address, count, number), begun = found, time.monotonic()
    mine = local_device_ids()
    peers, ending = roll_call(address, count, number, timeout, digest, secret or _known_to_all()), threading.Event()
    watch_thread = threading.Thread(target=_watch, args=(peers, f'process {number} of {count}', ending), daemon=True)
    watch_thread.start()
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    left = max(LEAST, timeout - (time.monotonic() - begun))
    try:
        aside(
            lambda: jax.distributed.initialize(
                address,
                count,
                number,
                mine,
                cluster_detection_method='deactivate',
                initialization_timeout=round(left),
                coordinator_bind_address=None if number else where(address),
            )
        )
    except Exception as error:
        raise ProcessLost(f'process {number} of {count}: JAX cannot join the others: {first_line(error)}') from error
    if threading.current_thread() is threading.main_thread():
        for signum in signals()[1:]:
            signal.signal(signum, _interrupted)
    try:
        yield
    except Exception as error:
        error = known(error)
        if error.code in (1, ProcessLost.code):
            time.sleep(3)  # where another's end is the cause, `_watch` says so and ends this process
        ending.set()
        _tell(peers, error.code, f'process {number}: {one_line(error)}')
        if not number:
            time.sleep(LAST)  # without process 0 JAX aborts the others
        raise
    finally:
        if not isinstance(sys.exception(), Exception):  # done, or stopped, as all of them are
            _tell(peers, FAREWELL)
            jax.distributed.shutdown()


def _interrupted(signum, _):
    """Ctrl-C and SIGHUP do what SIGTERM does, whose handler is JAX's: it stops all after the same step. A second Ctrl-C
    ends this process at once."""
    signal.signal(signum, signal.SIG_DFL if signum == signal.SIGINT else signal.SIG_IGN)
    os.kill(os.getpid(), signal.SIGTERM)


def _tell(peers, code, text=''):
    """Tells others, in a line, how this process ends."""
    for connection in peers.values():
        with contextlib.suppress(OSError):
            connection.sendall(b'%d %b\n' % (code, text.encode('unicode_escape')))


def _heard(connection, begun):
    """What another process has said, [(code, text)], and what of it is not a whole line yet, as `begun` was before.

    Raises ConnectionError where it has hung up, or says what is none of ours.
    """
    piece = connection.recv(LIMIT)
    *lines, rest = (begun + piece).split(b'\n')
    matches = [ENDS.fullmatch(line) for line in lines]
    if not all(matches):
        raise ConnectionError('not a line of ours')
    said = [(int(match[1]), match[2].decode('unicode_escape', 'replace')) for match in matches]
    if not said and (not piece or len(rest) > LIMIT):
        raise ConnectionError('hung up')
    return said, rest


def _watch(peers, here, ending):
    """Ends this process when another one ends without a farewell; process 0 hears of it and tells the others. `ending`
    is set when this process has an error of its own to end with."""
    begun = dict.fromkeys(peers, b'')
    with selectors.DefaultSelector() as selector:
        for number, connection in peers.items():
            selector.register(connection, selectors.EVENT_READ, number)
        while selector.get_map():
            for key, _ in selector.select():
                try:
                    said, begun[key.data] = _heard(key.fileobj, begun[key.data])
                except OSError:
                    said = [(ProcessLost.code, f'process {key.data} is gone')]
                if not said:
                    continue
                code, text = said[0]
                if code == FAREWELL:
                    selector.unregister(key.fileobj)
                    continue
                if 0 not in peers:
                    _tell(peers, code, text)
                if code != ProcessLost.code:
                    ending.wait(1)  # most errors come to all processes, and each tells its own
                if ending.is_set():
                    return
                if code == ProcessLost.code:
                    code = call(_raise, ProcessLost(f'{here}: {text}; run the same command again to continue'))
                else:
                    console.say(f'mixln_jax: {here}: another one has ended: {text}', file=sys.stderr)
                if 0 not in peers:  # process 0 ends last: without it JAX aborts the others
                    _wait_for_end(peers)
                return end(code)


def _wait_for_end(peers):
    """Returns when the others have hung up, after LAST seconds at the latest."""
    deadline = time.monotonic() + LAST
    for connection in peers.values():
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        with contextlib.suppress(OSError):
            while connection.recv(1000):
                pass


def any_of(flag) -> bool:
    """Whether `flag` holds in any process. Every process has to ask."""
    return bool(np.any(multihost_utils.process_allgather(np.array(bool(flag)))))


def meet(where: str):
    """Returns when all processes have come to `where`."""
    multihost_utils.sync_global_devices(where)


def check_shared(folder):
    """Raises UsageError in every process where they do not all see the same `folder`. Every process has to ask."""
    if jax.process_count() == 1:
        return
    mark = multihost_utils.broadcast_one_to_all(np.array(np.random.default_rng().integers(2**31), np.int32))
    path = pathlib.Path(folder, f'.seen-by-all-{int(mark)}')
    if not jax.process_index():
        path.touch()
    meet(f'marked {path.name}')
    deadline, seen = time.monotonic() + 10, False
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)  # network file systems may show a new file late
        os.listdir(folder)
    alone = any_of(not seen)
    if not jax.process_index():
        path.unlink()
    if alone:
        raise UsageError(
            f'the work directory {folder} is not one folder for all {jax.process_count()} processes: '
            'it must lie where all of them see it'
        )


def end(code: int):
    """Ends this process at once: among several, Python's own end would wait for those that are gone."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _raise(error):
    raise error


class SharedStop(Stop):
    """A Stop for several processes: a SIGTERM to any of them stops all behind the same step.

    JAX's preemption service has the handler; a handler of ours would take its place. Only `reached` looks at it, where
    all processes do.
    """

    def reached(self, step):
        """Whether all processes are to stop behind `step`. Every process has to ask at every step."""
        if multihost_utils.reached_preemption_sync_point(step):
            self.requested = self.requested or 'SIGTERM'
        return bool(self.requested)


def watch(seconds: float):
    """Dumps the stacks of all threads to stderr unless it is called again within `seconds`; 0 ends that."""
    faulthandler.cancel_dump_traceback_later()
    if seconds:
        faulthandler.dump_traceback_later(seconds, repeat=True, file=sys.__stderr__)
