"""Does damage of many kinds and counts what came of it: `python -m benchmarks.campaign [--only PART,...] [--fast]`.

docs/contracts.md has the table. Whatever breaks a contract is printed with what made it, and the exit code is 1.
"""

import argparse
import collections
import contextlib
import pathlib
import sys
import tempfile
import time

from benchmarks.campaign import checkpoints, files, inputs, stops
from benchmarks.campaign.judging import Broken
from benchmarks.campaign.run import Base

PARTS = {
    part.__name__: part
    for part in (
        stops.kills,
        stops.signals,
        checkpoints.flips,
        checkpoints.structure,
        files.files,
        inputs.malformed,
        inputs.strangers,
    )
}


def table(results):
    """The markdown table of all that came of it, and what broke."""
    rows = collections.defaultdict(collections.Counter)
    for row, _, outcome in results:
        rows[row]['BROKEN' if isinstance(outcome, Broken) else outcome] += 1
    lines = ['| | tried | what came of it | broken |', '|---|---|---|---|']
    for row, counts in rows.items():
        broken = counts.pop('BROKEN', 0)
        shown = ', '.join(f'{number} {outcome}' for outcome, number in counts.most_common())
        lines.append(f'| {row} | {sum(counts.values()) + broken} | {shown} | {broken} |')
    return lines


def campaign(argv):
    parser = argparse.ArgumentParser(prog='python -m benchmarks.campaign', description=__doc__, allow_abbrev=False)
    parser.add_argument('--only', default=','.join(PARTS), help='parts, separated by commas [%(default)s]')
    parser.add_argument('--fast', action='store_true', help='a few cases of each part')
    options = parser.parse_args(argv)
    if unknown := {*options.only.split(',')} - {*PARTS}:
        parser.error(f'--only {", ".join(sorted(unknown))}: the parts are {", ".join(PARTS)}')
    results = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        base = Base(pathlib.Path(folder))
        for part in options.only.split(','):
            begun = time.monotonic()
            for result in PARTS[part](base, *([4] if options.fast else [])):
                results.append(result)
                if isinstance(result[2], Broken):
                    print(f'BROKEN: {result[0]}: {result[1]}: {result[2]}', flush=True)
            print(f'{part}: {time.monotonic() - begun:.0f} s', file=sys.stderr, flush=True)
    print(*table(results), sep='\n')
    return any(isinstance(outcome, Broken) for *_, outcome in results)


if __name__ == '__main__':
    sys.exit(campaign(sys.argv[1:]))
