"""The roll call: checks that all processes of a run have started and agree, before JAX starts, which would not name the
missing ones.

Process 0 listens; every other process connects to it. Each side proves its identity by HMACs over nonces of both sides,
so a recorded exchange is of no use to anybody else. They exchange four lines:

    process 0  NONCE
    other      NUMBER COUNT NONCE PROOF PROOF      with the secret; with the secret and the digest
    process 0  PROOF welcome
    process 0  PROOF all present                   or what is wrong

Whoever does not prove its identity is a stranger. Strangers are turned away and counted; they delay nobody.
"""

import contextlib
import dataclasses
import hashlib
import hmac
import os
import re
import secrets
import selectors
import socket
import sys
import time
from collections.abc import Sequence

from mixln_jax.distributed import addresses
from mixln_jax.system import console
from mixln_jax.system.errors import ProcessLost, UsageError

DIFFERENT, WELCOME, ALL = 'processes differ:', 'welcome', 'all present'
NONCE = re.compile(rb'[0-9a-f]{32}')
HELLO = re.compile(rb'([0-9]{1,6}) ([0-9]{1,6}) ([0-9a-f]{32}) ([0-9a-f]{64}) ([0-9a-f]{64})')
LIMIT = 4000  # bytes of a line
SOON = 5.0  # seconds in which a connection has to prove its identity
PAUSE = 0.3  # seconds between two attempts to reach process 0
AT_ONCE = 200  # connections that may wait for their proof
LATE = 5.0  # seconds to wait beyond the deadline for process 0, which may have started later, to name the missing ones
NAMED = 20  # missing processes that are named
UNSURE = 'without processes.secret anybody can claim this: waiting for another answer until the timeout'
UNPROVEN = 'that did not prove to belong to this run (strangers, or another processes.secret)'


def roll_call(
    address: str, count: int, number: int, timeout: float, digest: str, secret: str = ''
) -> dict[int, socket.socket]:
    """Returns, in every process, when all have connected to process 0 at `address`.

    Args:
        address: host:port of process 0.
        count: number of processes.
        number: of this process.
        timeout: seconds to wait for all.
        digest: of everything that has to be the same in every process; it is never sent.
        secret: known only to the processes of this run. Without one anybody can claim to be a process with another
            configuration; such a claim is believed only at the timeout.

    Returns:
        The connections, which stay open, by process number: in process 0 to all others, in every other to process 0.

    Raises:
        ProcessLost: some processes, which are named, are missing after `timeout`.
        UsageError: a process has another count or digest.
    """
    name, deadline = f'process {number} of {count}', time.monotonic() + timeout
    keys = _Keys.derive(secret, digest)
    if number:
        problem, peers, strangers = _answer(address, number, count, deadline, keys)
    else:
        problem, peers, strangers = _call(address, count, deadline, keys)
    if problem.startswith(DIFFERENT):
        raise UsageError(f'{name}, process 0 at {address}: {problem}')
    if problem:
        note = f'; turned away {strangers} {UNPROVEN}' if strangers else ''
        raise ProcessLost(f'{name}, process 0 at {address}: {problem} (waited {timeout:g} s{note})')
    if strangers:
        console.say(f'mixln_jax: {name}: turned away {strangers} {UNPROVEN}', file=sys.stderr)
    for connection in peers.values():
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return peers


@dataclasses.dataclass(frozen=True)
class _Keys:
    member: bytes  # known to all processes that have the secret
    equal: bytes  # known to those that have the same digest, too
    secret: bool  # whether there is a secret

    @classmethod
    def derive(cls, secret: str, digest: str) -> '_Keys':
        member = hashlib.sha256(f'mixln_jax roll call {secret}'.encode(errors='surrogatepass')).digest()
        return cls(member, hmac.digest(member, digest.encode(), 'sha256'), bool(secret))

    def check(self, proofs: Sequence[str], *words: str) -> tuple[bool, bool]:
        """Returns whether the first proof was made with the secret, and the second with the same digest, too."""
        member, equal = proofs
        return (
            hmac.compare_digest(_proof(self.member, *words), member),
            hmac.compare_digest(_proof(self.equal, *words), equal),
        )


def _proof(key: bytes, *words: str) -> str:
    return hmac.new(key, ' '.join(words).encode(), 'sha256').hexdigest()


def _signed(key: bytes, words: Sequence[str], text: str) -> bytes:
    """Returns a line of process 0 to a process; `words` are their nonces and the words of its hello."""
    return f'{_proof(key, "process 0", *words, text)} {text}\n'.encode()


# What both sides of the roll call end with: a problem, or ''; the connections; the number of strangers.
Outcome = tuple[str, dict[int, socket.socket], int]


def _call(address: str, count: int, deadline: float, keys: _Keys) -> Outcome:
    """Holds the roll call in process 0."""
    listening = addresses.listen_address(address)
    host, port = addresses.split(listening)
    if host == '::' and not os.environ.get(addresses.BIND):
        name = addresses.split(address)[0]
        notice = f'{name} is not one address of this host, so process 0 listens on all interfaces'
        console.say(f'mixln_jax: {notice} ({addresses.BIND}=host:port selects one)', file=sys.stderr)
    try:
        server = addresses.listen(host, port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UsageError(f'port {port} of the coordinator cannot be used ({listening}: {reason})') from error
    with server, contextlib.closing(_Host(server, count, deadline, keys)) as caller:
        caller.call()
        if caller.problem:
            return caller.problem, {}, caller.strangers
        present, caller.present = caller.present, {}  # so that they stay open
        return '', {number: visitor.connection for number, visitor in present.items()}, caller.strangers


class _Visitor:
    """A connection to process 0."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection, self.deadline, self.received = connection, time.monotonic() + SOON, b''
        self.nonce = secrets.token_hex(16)
        self.words: tuple[str, ...] = ()
        self.key = b''  # set once it has proven its identity

    def tell(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.connection.sendall(_signed(self.key, self.words, text))

    def gone(self) -> bool:
        """Returns whether it has hung up, or sends more than its hello."""
        try:
            self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True


class _Host:
    """The roll call in process 0. It reads from all connections at once, so that no stranger delays anybody."""

    def __init__(self, server: socket.socket, count: int, deadline: float, keys: _Keys) -> None:
        server.setblocking(False)
        self.problem, self.strangers = '', 0
        self.present: dict[int, _Visitor] = {}
        self._server, self._count, self._deadline, self._keys = server, count, deadline, keys
        self._waiting: list[_Visitor] = []
        self._different: list[_Visitor] = []
        self._claims: dict[int, str] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(server, selectors.EVENT_READ)

    def close(self) -> None:
        for visitor in [*self._waiting, *self._different, *self.present.values()]:
            visitor.connection.close()
        self._selector.close()

    def call(self) -> None:
        """Returns when all are present or time is up, and has told the processes of this run so, or what is wrong."""
        while len(self.present) + len(self._different) < self._count - 1:
            now = time.monotonic()
            if now >= self._deadline:
                self.problem = self.problem or self._missing()
                break
            for key, _ in self._selector.select(min(self._deadline - now, 0.5)):
                if key.fileobj is self._server:
                    self._accept()
                elif key.data in self._waiting:
                    self._read(key.data)
                elif key.data in self.present.values() and key.data.gone():
                    self._close(key.data)
            for visitor in [one for one in self._waiting if one.deadline < now]:
                self._turn_away(visitor)
        for visitor in self._waiting[:]:
            self._turn_away(visitor)
        for visitor in [*self.present.values(), *self._different]:
            visitor.tell(self.problem or ALL)

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except (BlockingIOError, ConnectionError):
            return  # the other side has hung up already
        except OSError:  # too many open files
            time.sleep(0.01)
            for visitor in self._waiting[:1]:
                self._turn_away(visitor)
            return
        if len(self._waiting) == AT_ONCE:
            self._turn_away(self._waiting[0])
        visitor = _Visitor(connection)
        self._waiting.append(visitor)
        self._selector.register(connection, selectors.EVENT_READ, visitor)
        with contextlib.suppress(OSError):
            connection.sendall(f'{visitor.nonce}\n'.encode())

    def _close(self, visitor: _Visitor) -> None:
        self._selector.unregister(visitor.connection)
        visitor.connection.close()
        self._waiting = [one for one in self._waiting if one is not visitor]
        self.present = {number: one for number, one in self.present.items() if one is not visitor}

    def _turn_away(self, visitor: _Visitor) -> None:
        self.strangers += 1
        self._close(visitor)

    def _read(self, visitor: _Visitor) -> None:
        try:
            piece = visitor.connection.recv(LIMIT)
        except BlockingIOError:
            return
        except OSError:
            piece = b''
        visitor.received += piece
        line, end, more = visitor.received.partition(b'\n')
        if end and not more:
            self._judge(visitor, HELLO.fullmatch(line))
        elif end or not piece or len(line) > LIMIT:
            self._turn_away(visitor)

    def _judge(self, visitor: _Visitor, hello: re.Match[bytes] | None) -> None:
        """Admits a visitor that has sent a line, refuses it or turns it away."""
        if not hello:
            return self._turn_away(visitor)
        number_text, count_text, nonce, *proofs = (word.decode() for word in hello.groups())
        visitor.words = visitor.nonce, nonce, number_text, count_text
        member, equal = self._keys.check(proofs, 'hello', *visitor.words)
        number, same_count, sure = int(number_text), int(count_text) == self._count, equal or self._keys.secret
        if not member or ((same_count or not sure) and not 0 < number < self._count):
            return self._turn_away(visitor)
        if visitor.gone():  # a process that was not answered at once, and will connect again
            return self._close(visitor)
        self._waiting.remove(visitor)
        visitor.key = self._keys.equal if equal else self._keys.member
        if not (equal and same_count):
            self._refuse(visitor, number, sure)
        elif number in self.present and not self.present[number].gone():
            self._differ(visitor, f'{DIFFERENT} two are number {number}')
        else:
            if number in self.present:
                self._close(self.present[number])
            self.present[number] = visitor
            visitor.tell(WELCOME)

    def _differ(self, visitor: _Visitor, problem: str) -> None:
        """Ends the roll call soon, but not at once: processes that connect a little later are to be told why."""
        self.problem = problem
        self._different.append(visitor)
        self._deadline = min(self._deadline, time.monotonic() + LATE)

    def _refuse(self, visitor: _Visitor, number: int, sure: bool) -> None:
        """Refuses a process with another configuration. If it is `sure` to belong to this run, the roll call ends;
        otherwise anybody may have claimed it."""
        problem = f'{DIFFERENT} process {number} has another count, configuration or versions than process 0'
        if sure:
            return self._differ(visitor, problem)
        if number not in self._claims:
            console.say(f'mixln_jax: process 0 of {self._count}: {problem}; {UNSURE}', file=sys.stderr)
        self._claims[number] = problem
        visitor.tell(problem)
        self._close(visitor)

    def _missing(self) -> str:
        missing = [number for number in range(1, self._count) if number not in self.present]
        named = ', '.join(map(str, missing[:NAMED])) + (f' and {len(missing) - NAMED} more' if missing[NAMED:] else '')
        claimed = (self._claims[number] for number in missing if number in self._claims)
        return next(claimed, f'missing: {named} of 0 to {self._count - 1}')


def _answer(address: str, number: int, count: int, deadline: float, keys: _Keys) -> Outcome:
    """Answers the roll call in any other process."""
    (host, port), problem, strangers = addresses.split(address), 'it did not answer', 0
    while (remaining := deadline - time.monotonic()) > 0:
        for *_, target in addresses.resolve(host, port, remaining):  # a stranger may listen at one of them
            try:
                connection = _connect(target, deadline)
            except OSError:
                continue
            with contextlib.ExitStack() as closing:
                closing.callback(connection.close)
                try:
                    answer, sure = _introduce(connection, number, count, deadline, keys)
                except ValueError:
                    strangers += 1
                    continue
                except OSError:
                    problem = 'it did not confirm that all are present'
                    continue
                if sure and answer == ALL:
                    closing.pop_all()
                    return '', {0: connection}, strangers
                if sure:
                    return answer, {}, strangers
                if problem != answer:
                    console.say(f'mixln_jax: process {number} of {count}: {answer}; {UNSURE}', file=sys.stderr)
                problem = answer
        time.sleep(max(0, min(PAUSE, deadline - time.monotonic())))
    return problem, {}, strangers


def _connect(target: tuple, deadline: float) -> socket.socket:
    connection = socket.create_connection(target[:2], max(0.01, min(deadline - time.monotonic(), SOON)))
    with contextlib.ExitStack() as closing:
        closing.callback(connection.close)
        if connection.getsockname() == connection.getpeername():
            raise ConnectionError('nobody listens at the port: TCP has connected it with itself')
        closing.pop_all()
        return connection


def _introduce(connection: socket.socket, number: int, count: int, deadline: float, keys: _Keys) -> tuple[str, bool]:
    """Returns (the answer of process 0, whether it is sure to be process 0) once all are present or one is refused.

    Raises ValueError for a stranger; OSError if process 0 hangs up or does not answer in time.
    """

    def receive(limit: float) -> tuple[str, bool]:
        proof, _, text = _line(connection, limit).decode('ascii').partition(' ')
        member, equal = keys.check((proof, proof), 'process 0', *words, text)
        if not equal and not (member and text.startswith(DIFFERENT)):
            raise ValueError('no proof')
        return text, equal or keys.secret

    nonce, soon = secrets.token_hex(16), min(deadline, time.monotonic() + SOON)
    try:
        given = _line(connection, soon)
        if not NONCE.fullmatch(given):
            raise ValueError('no nonce')
        words = given.decode(), nonce, str(number), str(count)
        proofs = [_proof(key, 'hello', *words) for key in (keys.member, keys.equal)]
        connection.sendall(' '.join([str(number), str(count), nonce, *proofs]).encode() + b'\n')
        answer = receive(soon)
    except OSError as error:
        raise ValueError('it hung up or did not answer') from error
    return receive(deadline + LATE) if answer[0] == WELCOME else answer


def _line(connection: socket.socket, deadline: float) -> bytes:
    """Returns the next line and reads no byte beyond it, for those are read elsewhere. Raises OSError if none comes."""
    line = b''
    while not line.endswith(b'\n'):
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        byte = connection.recv(1)
        if not byte or len(line) == LIMIT:
            raise ConnectionError('no complete line')
        line += byte
    return line[:-1]
