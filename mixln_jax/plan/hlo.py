"""Reads the text of a compiled program: how often each operation runs, what devices exchange, and how long the compiler
for TPUs expects each part to take."""

import collections
import math
import re
from collections.abc import Iterator

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
BYTES = {'f32': 4, 's32': 4, 'u32': 4, 'bf16': 2, 'f16': 2, 's8': 1, 'u8': 1, 'pred': 1}
PARTS = ('attention', 'mlp', 'embed', 'head', 'update')  # names of modules and scopes, as in op_name


def operations(text: str) -> Iterator[tuple[str, int, bool]]:
    """Yields every operation: its line, how often it runs in one execution, whether it is inside a fusion.

    An operation in a loop runs in every round of the loop. All branches of a condition are counted.
    """
    lines: dict[str, list[str]] = collections.defaultdict(list)  # by computation
    limits: dict[str, int] = {}
    entry, name = '', ''
    for line in text.splitlines():
        if head := re.match(r'(ENTRY )?%?([\w.-]+) .*\{$', line):
            name = head[2]
            entry = name if head[1] else entry
        elif ' = ' in line:
            lines[name].append(line)
            # JAX's loops end when a counter reaches a constant; the computation of the condition contains it.
            if constant := re.search(r' = s32\[\]\S* constant\((\d+)\)', line):
                limits[name] = int(constant[1])

    def walk(name: str, times: int, fused: bool) -> Iterator[tuple[str, int, bool]]:
        for line in lines[name]:
            yield line, times, fused
            condition = re.search(r'condition=%?([\w.-]+)', line)
            rounds = limits.get(condition[1], 1) if condition else 1
            for called in re.findall(r'(?:body|to_apply|calls|\w+_computations?)=\{?(%?[\w.-]+(?:, %[\w.-]+)*)', line):
                for computation in re.findall(r'[\w.-]+', called):
                    yield from walk(computation, times * rounds, fused or ' fusion(' in line)

    return walk(entry, 1, False)


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Returns {kind: (how often it runs in one execution, bytes of all results on a device)} of the collectives.

    Collectives among groups of one device are not counted.
    """
    totals: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    alone = re.compile(r'replica_groups=(\{\{\d+\}(,\{\d+\})*\}|\[\d+,1\]<)')
    for line, times, _ in operations(text):
        operation = re.search(rf'= (.*?) ({"|".join(COLLECTIVES)})(-start)?\(', line)
        if operation and not alone.search(line):
            # An asynchronous collective shows its operands before its results, and a state without dimensions.
            shapes = re.findall(r'(\w+)\[([\d,]+)\]', operation[1])
            shapes = shapes[len(shapes) // 2 :] if operation[3] else shapes
            size = sum(BYTES.get(kind, 4) * math.prod(map(int, filter(None, dims.split(',')))) for kind, dims in shapes)
            totals[operation[2]][0] += times
            totals[operation[2]][1] += times * size
    return {kind: (times, size) for kind, (times, size) in totals.items()}


def expected_cycles(text: str) -> dict[str, int]:
    """Returns {part: cycles of a TPU that the compiler expects}, the largest first.

    The parts are PARTS, `norms` and `the rest`. Collectives have no cycles. Only the compiler for TPUs expects cycles;
    the result is empty for others.
    """
    totals: collections.Counter[str] = collections.Counter()
    for line, times, fused in operations(text):
        cycles = re.search(r'"estimated_cycles":"(\d{1,12})"', line)  # more: unknown
        if cycles and not fused:
            totals[part(line)] += times * int(cycles[1])
    return dict(totals.most_common())


def part(line: str) -> str:
    """Returns the part of the network to which an operation belongs, by the modules and scopes in its metadata."""
    words = re.findall(r'\w+', (re.search(r'op_name="([^"]*)"', line) or ['', ''])[1])
    if any(re.fullmatch(r'(\w+_)?norm(_\w+)?', word) for word in words):
        return 'norms'
    return next((word for word in PARTS if word in words), 'the rest')
