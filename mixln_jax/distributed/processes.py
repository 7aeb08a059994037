"""Several processes that train one model: who they are, whether all have started, and how all stop at the same step."""

import contextlib
import faulthandler
import os
import pathlib
import re
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import NoReturn

import jax
import numpy as np
from jax._src import clusters  # JAX's own detection of schedulers, which has no public name
from jax.experimental import multihost_utils

from mixln_jax.distributed.addresses import in_thread, listen_address
from mixln_jax.distributed.rollcall import roll_call
from mixln_jax.system import console
from mixln_jax.system.cli import call
from mixln_jax.system.errors import ProcessLost, UsageError, first_line, one_line, to_exit
from mixln_jax.system.signals import Stop, signals

VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
SECRET = 'MIXLN_JAX_SECRET'
MIN_TIMEOUT = 10.0  # seconds that JAX gets to connect, however long the roll call took
LAST = 2.5  # seconds by which process 0 outlives the others
SCHEDULERS = ('slurm', 'ompi', 'gcetpu', 'gketpu')
# Variables in which SLURM gives the number of processes on each node, as `2(x3),1`; the last one, the total, serves for
# a single node.
TASKS = ('SLURM_STEP_TASKS_PER_NODE', 'SLURM_TASKS_PER_NODE', 'SLURM_NTASKS_PER_NODE', 'SLURM_NTASKS')
ENDS = re.compile(rb'([0-9]{1,2}) (.*)')  # exit code and message of a process that ends
FAREWELL = 0  # code of an end that all processes share
LIMIT = 16_000  # bytes of a line between processes
Peers = Mapping[int, socket.socket]  # connections by process number


def find() -> tuple[str, int, int] | None:
    """Returns (address of process 0, number of processes, number of this process); None for a single process.

    They come from JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or else from SLURM, Open
    MPI or a TPU pod. Raises UsageError if some of the three variables are missing or their values make no sense.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if given:
        if missing := [name for name in VARIABLES if name not in given]:
            raise UsageError(f'{", ".join(given)} is set, {", ".join(missing)} is not')
        address, *numbers = given.values()
        try:
            count, number = map(int, numbers)
            if not (0 <= number < count and 0 < int(address.rpartition(':')[2]) < 2**16):
                raise ValueError
        except ValueError:
            values = ', '.join(f'{name}={value}' for name, value in given.items())
            raise UsageError(f'{values} is not host:port, a count and a number below it') from None
    else:
        schedulers = (env for env in clusters.ClusterEnv._cluster_types if env.name in SCHEDULERS)
        environment = next((env for env in schedulers if env.is_env_present()), None)
        if environment is None:
            if int(os.environ.get('OMPI_COMM_WORLD_SIZE', 1)) > 1:
                raise UsageError(
                    f'this Open MPI does not say where process 0 is (version 4 does): set {", ".join(VARIABLES)}'
                )
            return None
        count, number = environment.get_process_count(), environment.get_process_id()
        address = environment.get_coordinator_address(60, None)
    return (address, count, number) if count > 1 else None


def _shared_secret() -> str:
    """Returns what the processes of this run know and strangers do not: the variable SECRET, or else the name that the
    scheduler has given the job, if the scheduler numbers the processes; '' if there is neither."""
    by_hand = any(os.environ.get(name) for name in VARIABLES)
    names = [SECRET] if by_hand else [SECRET, 'OMPI_MCA_orte_hnp_uri', 'SLURM_JOB_ID']
    return next(filter(None, map(os.environ.get, names)), '')


def _on_node() -> tuple[int, int]:
    """Returns (number of processes on this node, this one's number among them), by Open MPI or SLURM; else (1, 0)."""
    given = os.environ
    if 'OMPI_COMM_WORLD_LOCAL_SIZE' in given:  # comes first: if SLURM started mpirun, SLURM's numbers are mpirun's
        return int(given['OMPI_COMM_WORLD_LOCAL_SIZE']), int(given['OMPI_COMM_WORLD_LOCAL_RANK'])
    if 'SLURM_STEP_NODELIST' not in given or 'SLURM_LOCALID' not in given:  # not started by srun
        return 1, 0
    text = next((given[name] for name in TASKS if given.get(name)), '1')
    counts = [int(tasks) for tasks, nodes in re.findall(r'(\d+)(?:\(x(\d+)\))?', text) for _ in range(int(nodes or 1))]
    return counts[min(int(given.get('SLURM_NODEID', 0)), len(counts) - 1)], int(given['SLURM_LOCALID'])


def local_device_ids() -> list[int] | None:
    """Returns which of the visible GPUs are this process's own; None: all of them, or those of JAX_LOCAL_DEVICE_IDS.

    Processes on one node that see the same GPUs share them evenly. JAX by itself gives each of them a single GPU,
    however many there are. Raises UsageError if the GPUs cannot be shared evenly.
    """
    count, number = _on_node()
    if count == 1 or os.environ.get('JAX_LOCAL_DEVICE_IDS'):
        return None
    visible = next(filter(None, map(os.environ.get, ('CUDA_VISIBLE_DEVICES', 'ROCR_VISIBLE_DEVICES'))), None)
    on_node = int(os.environ.get('SLURM_GPUS_ON_NODE') or 0)
    seen = len(visible.split(',')) if visible else on_node
    if not seen:
        return [number]  # one for each process, or none at all
    if seen < max(count, on_node):
        return None  # SLURM shows each process its own (--gpus-per-task)
    if seen % count:
        raise UsageError(
            f'{count} processes on this node cannot share its {seen} GPUs evenly: start a number that divides {seen} '
            '(--ntasks-per-node; one takes all), or set JAX_LOCAL_DEVICE_IDS'
        )
    share = seen // count
    return list(range(number * share, (number + 1) * share))


@contextlib.contextmanager
def joined(timeout: float, digest: str, secret: str = '') -> Iterator[None]:
    """Joins the other processes, if there are any. Enter it before JAX does anything else.

    Inside the block this process ends with exit code 8 as soon as another one is lost, even while it waits for that
    one. If another process ends with an error, this one ends with the same exit code.

    Args:
        timeout: seconds to wait for all processes.
        digest: of everything that has to be the same in every process.
        secret: known only to these processes; empty: MIXLN_JAX_SECRET, or the scheduler's name of the job.

    Raises:
        ProcessLost: some processes, which are named, are missing after `timeout`.
        UsageError: a process has another digest or count.
    """
    identity = find()
    if not identity:
        yield
        return
    (address, count, number), start = identity, time.monotonic()
    device_ids = local_device_ids()
    peers, ending = roll_call(address, count, number, timeout, digest, secret or _shared_secret()), threading.Event()
    name = f'process {number} of {count}'
    threading.Thread(target=_watch, args=(peers, name, ending), daemon=True).start()
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    remaining = max(MIN_TIMEOUT, timeout - (time.monotonic() - start))
    try:
        in_thread(
            lambda: jax.distributed.initialize(
                address,
                count,
                number,
                device_ids,
                cluster_detection_method='deactivate',
                initialization_timeout=round(remaining),
                coordinator_bind_address=None if number else listen_address(address),
            )
        )
    except Exception as error:
        raise ProcessLost(f'{name}: JAX cannot join the others: {first_line(error)}') from error
    if threading.current_thread() is threading.main_thread():
        for signum in signals()[1:]:
            signal.signal(signum, _interrupted)
    try:
        yield
    except Exception as error:
        ending_error = to_exit(error)
        if ending_error.code in (1, ProcessLost.code):
            time.sleep(3)  # if the end of another process is the cause, `_watch` reports it and ends this process
        ending.set()
        _tell(peers, ending_error.code, f'process {number}: {one_line(ending_error)}')
        if not number:
            time.sleep(LAST)  # without process 0 JAX aborts the others
        raise
    finally:
        if not isinstance(sys.exception(), Exception):  # finished or stopped, as all processes are
            _tell(peers, FAREWELL)
            jax.distributed.shutdown()


def _interrupted(signum: int, _: FrameType | None) -> None:
    """Makes Ctrl-C and SIGHUP act as SIGTERM, whose handler is JAX's and stops all processes after the same step. A
    second Ctrl-C ends this process at once."""
    signal.signal(signum, signal.SIG_DFL if signum == signal.SIGINT else signal.SIG_IGN)
    os.kill(os.getpid(), signal.SIGTERM)


def _tell(peers: Peers, code: int, text: str = '') -> None:
    """Sends other processes one line about how this one ends."""
    for connection in peers.values():
        with contextlib.suppress(OSError):
            connection.sendall(b'%d %b\n' % (code, text.encode('unicode_escape')))


def _receive(connection: socket.socket, partial: bytes) -> tuple[list[tuple[int, str]], bytes]:
    """Reads from another process. Returns its messages, (exit code, text), and the part of a line that is left over.

    `partial` is what was left over by the call before. Raises ConnectionError if the other process has hung up or
    sends anything else.
    """
    piece = connection.recv(LIMIT)
    *lines, rest = (partial + piece).split(b'\n')
    messages = []
    for line in lines:
        if not (match := ENDS.fullmatch(line)):
            raise ConnectionError('not a line of this program')
        messages.append((int(match[1]), match[2].decode('unicode_escape', 'replace')))
    if not messages and (not piece or len(rest) > LIMIT):
        raise ConnectionError('hung up')
    return messages, rest


def _watch(peers: Peers, name: str, ending: threading.Event) -> None:
    """Ends this process when another one ends without a farewell. Process 0 is told of it and tells the others.

    `name` is this process's, for messages; `ending` is set when it is about to end with an error of its own.
    """
    partial = dict.fromkeys(peers, b'')
    with selectors.DefaultSelector() as selector:
        for number, connection in peers.items():
            selector.register(connection, selectors.EVENT_READ, number)
        while selector.get_map():
            for key, _ in selector.select():
                number = key.data
                try:
                    messages, partial[number] = _receive(peers[number], partial[number])
                except OSError:
                    messages = [(ProcessLost.code, f'process {number} is gone')]
                if not messages:
                    continue
                code, text = messages[0]
                if code == FAREWELL:
                    selector.unregister(peers[number])
                    continue
                if 0 not in peers:
                    _tell(peers, code, text)
                if code != ProcessLost.code:
                    ending.wait(1)  # most errors occur in all processes, and each reports its own
                if ending.is_set():
                    return
                if code == ProcessLost.code:
                    code = call(_raise, ProcessLost(f'{name}: {text}; run the same command again to continue'))
                else:
                    console.say(f'mixln_jax: {name}: another one has ended: {text}', file=sys.stderr)
                if 0 not in peers:  # process 0 ends last: without it JAX aborts the others
                    _wait_for_end(peers)
                end(code)
                return  # for tests, which replace `end`


def _wait_for_end(peers: Peers) -> None:
    """Returns when the others have hung up, or after LAST seconds."""
    deadline = time.monotonic() + LAST
    for connection in peers.values():
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        with contextlib.suppress(OSError):
            while connection.recv(1000):
                pass


def any_process(flag: object) -> bool:
    """Returns whether `flag` is true in any process. Every process has to call it."""
    return bool(np.any(multihost_utils.process_allgather(np.array(bool(flag)))))


def of_first(number: int) -> int:
    """Returns the `number` of process 0. Every process has to call it."""
    if jax.process_count() == 1:
        return number
    with jax.transfer_guard('allow'):  # the number goes over the devices
        return int(multihost_utils.broadcast_one_to_all(np.array(number, np.int32)))


def barrier(name: str) -> None:
    """Returns when all processes have reached the barrier called `name`."""
    multihost_utils.sync_global_devices(name)


def check_shared(folder: str | os.PathLike) -> None:
    """Raises UsageError, in every process, unless all processes see the same `folder`. Every process has to call it."""
    if jax.process_count() == 1:
        return
    mark = multihost_utils.broadcast_one_to_all(np.array(np.random.default_rng().integers(2**31), np.int32))
    path = pathlib.Path(folder, f'.seen-by-all-{int(mark)}')
    if not jax.process_index():
        path.touch()
    barrier(f'marked {path.name}')
    deadline, seen = time.monotonic() + 10, False
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)  # network file systems may show a new file late
        os.listdir(folder)
    separate = any_process(not seen)
    if not jax.process_index():
        path.unlink()
    if separate:
        raise UsageError(
            f'the work directory {folder} is not one folder for all {jax.process_count()} processes: '
            'put it on a file system that all of them share'
        )


def end(code: int) -> NoReturn:
    """Ends this process at once. Python's regular exit would wait for processes that were lost."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _raise(error: Exception) -> NoReturn:
    raise error


class SharedStop(Stop):
    """A Stop for several processes: a SIGTERM to any of them stops all after the same step.

    The handler is that of JAX's preemption service, which a handler of ours would replace. Only `reached`, which all
    processes call, asks the service.
    """

    def reached(self, step: int) -> bool:
        """Returns whether all processes are to stop after `step`. Every process has to call it at every step."""
        if multihost_utils.reached_preemption_sync_point(step):
            self.requested = self.requested or 'SIGTERM'
        return bool(self.requested)


def watch(seconds: float) -> None:
    """Prints the stacks of all threads to stderr unless it is called again within `seconds`; 0 stops the watch."""
    faulthandler.cancel_dump_traceback_later()
    if seconds and sys.__stderr__:
        faulthandler.dump_traceback_later(seconds, repeat=True, file=sys.__stderr__)
