"""A worker: it claims the next free cell by a lock that dies with it, and trains it in a process of its own."""

import dataclasses
import os
import pathlib
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from mixln_jax.runs import sweep_folder
from mixln_jax.runs.sweep_folder import FAILED, Ending
from mixln_jax.sweeps import child
from mixln_jax.sweeps.grid import Cell, Pairs
from mixln_jax.system import errors, outputs, signals
from mixln_jax.system.errors import UsageError
from mixln_jax.training.collapse import COLLAPSED

POLL = 0.2  # seconds
SHARED = 'CUDA_VISIBLE_DEVICES'  # which processes side by side share
WARNED = re.compile(rf'mixln_jax: warning: step (\d+): .*{COLLAPSED}')
ENDED_AT = re.compile(r'mixln_jax: step (\d+): ')


@dataclasses.dataclass(frozen=True)
class Job:
    """What every cell of a sweep needs to be started."""

    folder: pathlib.Path  # of the sweep
    recipe: str  # FILE[:ARG]
    fixed: Pairs  # changes in all cells

    def command(self, cell: Cell) -> list[str]:
        """Returns the words that train a cell."""
        words = [f'--config.{key}={value}' for key, value in (*self.fixed, *cell.changes)]
        return child.command(['--config', self.recipe, '--workdir', f'{self.folder / cell.name}', *words])


@dataclasses.dataclass
class Running:
    """A cell that this worker trains."""

    cell: Cell
    slot: int
    process: subprocess.Popen
    lock: IO[bytes]
    log: pathlib.Path
    pruned: bool = False  # it was stopped because others are better

    def stop(self) -> None:
        """Asks the process to save and to end."""
        assert self.process.stdin
        if not self.process.stdin.closed:
            self.process.stdin.close()


class Worker:
    """Trains the cells of a sweep that no other worker trains, `parallel` at a time."""

    def __init__(self, job: Job, cells: Sequence[Cell], parallel: int, show: Callable[['Worker'], None]) -> None:
        """`show` is called now and then, with this worker."""
        self.job, self.show = job, show
        self.cells = [*cells]
        self.devices = share_devices(os.environ.get(SHARED), parallel)
        self.running: list[Running] = []
        self.elsewhere: set[str] = set()  # cells that other workers train
        self.stopped: set[str] = set()  # cells that were stopped, not by this worker
        self.endings = {cell.name: sweep_folder.read_ending(job.folder / cell.name) for cell in cells}
        self.remember()

    def remember(self) -> None:
        """Takes what is recorded now for the past: a failed cell of the past is tried again."""
        self._before = dict(self.endings)

    def work(self, stop: signals.Stop) -> None:
        """Returns when every cell has ended or is another worker's. Raises Stopped, with all cells saved, at a
        signal."""
        try:
            while True:
                if not stop.requested:
                    self.fill()
                if not self.running:
                    break
                self.show(self)
                time.sleep(POLL)
                if stop.requested:
                    self._stop_all()
                for one in [one for one in self.running if one.process.poll() is not None]:
                    self._finish(one)
        finally:  # an error of ours: the cells are saved
            self._stop_all()
            for one in self.running:
                one.process.wait()
        self.show(self)
        stop.check()

    def _stop_all(self) -> None:
        for one in self.running:
            one.stop()

    def fill(self) -> None:
        """Starts free cells on all free slots."""
        for cell in self.cells:
            free = set(range(len(self.devices))) - {one.slot for one in self.running}
            if not free:
                return
            if self.is_open(cell.name) and (lock := outputs.hold(self._cell_file(cell, '.lock'))):
                self.elsewhere.discard(cell.name)
                self.endings[cell.name] = sweep_folder.read_ending(self.job.folder / cell.name)
                if self.is_open(cell.name):  # another worker may have ended it since
                    self.running.append(start(self.job, cell, lock, min(free), self.devices[min(free)]))
                else:
                    lock.close()
            elif self.is_open(cell.name):
                self.elsewhere.add(cell.name)

    def is_open(self, name: str) -> bool:
        """Returns whether a cell is still to be trained. One that has failed is tried once in each call."""
        if name in self.stopped or name in {one.cell.name for one in self.running}:
            return False
        ending = self.endings[name]
        return ending is None or not ending.is_result and ending == self._before.get(name)

    def _finish(self, one: Running) -> None:
        """Records how a cell ended, and releases it."""
        self.running.remove(one)
        one.stop()
        ending = read_end(one.process.returncode, one.log, self.job.folder / one.cell.name)
        if ending is None and one.pruned:
            digest = sweep_folder.digest(self.job.folder / one.cell.name)
            ending = Ending('pruned', errors.STOPPED, 'worse than most others at an evaluation', metrics=digest)
        if ending is None:
            self.stopped.add(one.cell.name)
        else:
            sweep_folder.write_ending(self.job.folder / one.cell.name, ending)
            self.endings[one.cell.name] = ending
        one.lock.close()

    def _cell_file(self, cell: Cell, suffix: str) -> pathlib.Path:
        return sweep_folder.cell_file(self.job.folder, cell.name, suffix)


def share_devices(visible: str | None, parallel: int) -> list[str | None]:
    """Returns the part of CUDA_VISIBLE_DEVICES, `visible`, that each of the processes side by side gets; None if it is
    not set. Raises UsageError if they do not divide."""
    if not visible or parallel == 1:
        return [visible] * parallel
    devices = visible.split(',')
    if len(devices) % parallel:
        raise UsageError(f'--parallel {parallel}: the {len(devices)} GPUs of {SHARED} do not divide by it')
    share = len(devices) // parallel
    return [','.join(devices[share * slot : share * (slot + 1)]) for slot in range(parallel)]


def start(job: Job, cell: Cell, lock: IO[bytes], slot: int, devices: str | None) -> Running:
    """Returns the process that trains a cell. It holds the lock too, so the cell is claimed until both have ended."""
    log = sweep_folder.cell_file(job.folder, cell.name, '.txt')
    if not (job.folder / cell.name).exists():
        for path in (log, sweep_folder.cell_file(job.folder, cell.name, '.json')):
            path.unlink(missing_ok=True)  # of a folder that somebody has removed
    environment: Mapping[str, str] = os.environ if devices is None else os.environ | {SHARED: devices}
    with log.open('ab') as output:
        process = child.start(job.command(cell), output, env=environment, pass_fds=[lock.fileno()])
    return Running(cell, slot, process, lock, log)


def read_end(code: int, log: pathlib.Path, run: pathlib.Path) -> Ending | None:
    """Returns how a cell ended; None if it was stopped and is to go on.

    Args:
        code: what its process returned; below 0: the signal that killed it.
        log: what it has printed.
        run: its folder.
    """
    if code == errors.STOPPED:
        return None
    lines = log.read_text(encoding='utf-8', errors='replace').splitlines()
    line = next((line for line in reversed(lines) if line.startswith('mixln_jax: ')), lines[-1] if lines else '')
    if code < 0:
        code, line = 128 - code, f'killed by signal {-code}'
    if code not in (0, errors.NumericsError.code):
        return Ending(FAILED, code, line)
    warned = next(filter(None, map(WARNED.match, lines)), None)
    at = ENDED_AT.match(line) if code else warned
    state = 'done' if at is None and not code else 'collapsed' if warned or COLLAPSED in line else 'not finite'
    return Ending(state, code, line if code else '', int(at[1]) if at else None, sweep_folder.digest(run))
