"""Runs a trial in a process of its own, and stops it once it has collapsed."""

import pathlib
import re
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from mixln_jax.advice import judgement, trials
from mixln_jax.advice.judgement import Verdict
from mixln_jax.advice.trials import Trial
from mixln_jax.runs import log
from mixln_jax.sweeps import child
from mixln_jax.system import errors, files, outputs, signals
from mixln_jax.system.errors import CheckpointError, UsageError

POLL = 0.5  # seconds
LOOK = 5  # seconds between looks at the lines
NOT_FINITE = re.compile(r'step (\d+): the loss or a gradient is not finite')


class Runner:
    """Runs trials of a recipe below a folder, and remembers how they ended."""

    def __init__(
        self, workdir: pathlib.Path, recipe: str, overrides: Sequence[tuple[str, str]], planned: int, stop: signals.Stop
    ) -> None:
        """`planned`: steps of the recipe, whose `overrides` the user gave."""
        self._workdir, self._recipe, self._overrides = workdir, recipe, list(overrides)
        self._planned, self._stop = planned, stop

    def run(self, trial: Trial) -> tuple[Verdict, list[dict[str, Any]]]:
        """Returns the verdict on a trial and its lines. Goes on where an earlier call was interrupted.

        Raises:
            Stopped: a signal has arrived; the run is saved.
            Exit: the run ended with an error other than a collapse, with its code and its line.
        """
        if not self._ending(trial).exists():  # no earlier call has ended it
            code, line = self._train(trial)
            outputs.write_json(self._ending(trial), {'code': code, 'line': line, 'overrides': self._words(trial)})
        ending = files.read_json(self._ending(trial), CheckpointError)
        if ending.get('overrides') != self._words(trial):
            raise UsageError(f'{self._ending(trial)} is of another recipe or other keys; give another --workdir')
        lines = self._lines(trial)
        if bad := NOT_FINITE.search(str(ending.get('line'))):
            lines = [*lines, {'step': int(bad[1]), 'train/loss': None}]
        return trial.judge(lines, self._planned), lines

    def _train(self, trial: Trial) -> tuple[int, str]:
        """Trains until the run ends or has collapsed. Returns its exit code and the last line that it printed."""
        printed = self._file(trial, '.txt')
        self._workdir.mkdir(parents=True, exist_ok=True)
        folder = trials.folder(self._workdir, trial)
        with printed.open('wb') as output:
            process = child.start(child.command(['--workdir', f'{folder}', *self._words(trial)]), output)
            try:
                collapsed = self._watch(process, trial)
            finally:
                assert process.stdin
                process.stdin.close()  # it saves and ends
                code = process.wait()
        if collapsed:
            return errors.NumericsError.code, 'it had collapsed, and was stopped'
        self._stop.check()
        text = printed.read_text(encoding='utf-8', errors='replace').strip()
        line = text.splitlines()[-1] if text else ''
        if code not in (0, errors.NumericsError.code):
            kind = next((kind for kind in errors.Exit.__subclasses__() if kind.code == code), errors.Exit)
            shown = line.removeprefix('mixln_jax: ') if code > 0 else f'killed by signal {-code}'
            raise kind(f'{folder}: {shown} ({printed} has all that it printed)')
        return code, line

    def _watch(self, process: subprocess.Popen, trial: Trial) -> bool:
        """Waits until a process ends or a signal arrives (False), or its run has collapsed (True)."""
        looked = time.monotonic()
        while process.poll() is None and not self._stop.requested:
            time.sleep(POLL)
            if time.monotonic() > looked + LOOK:
                looked = time.monotonic()
                if trial.judge(self._lines(trial), self._planned).state == judgement.COLLAPSED:
                    return True
        return False

    def _lines(self, trial: Trial) -> list[dict[str, Any]]:
        """Returns the metrics lines of a run, as many as there are."""
        path = trials.folder(self._workdir, trial) / 'metrics.jsonl'
        return log.read_metrics(path) if path.exists() else []

    def _words(self, trial: Trial) -> list[str]:
        changes = [f'--config.{key}={value}' for key, value in (*self._overrides, *trial.overrides())]
        return ['--config', self._recipe, *changes]

    def _ending(self, trial: Trial) -> pathlib.Path:
        return self._file(trial, '.json')

    def _file(self, trial: Trial, suffix: str) -> pathlib.Path:
        return self._workdir / f'{trial.name}{suffix}'
