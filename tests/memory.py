"""The peak memory of a process that a test starts."""

import pathlib
import re
import sys

import pytest

LINUX = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs /proc')


def peak() -> int:
    """Returns the largest resident memory of this process in kB; that of `getrusage` begins with its parent's."""
    return int(re.search(r'VmHWM:\s+(\d+)', pathlib.Path('/proc/self/status').read_text())[1])
