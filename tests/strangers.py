"""Strangers at a roll call: what they do to process 0, and what they answer in its place.

`python tests/strangers.py` tries each on a real roll call of two processes and prints how many of those met.
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import socket
import struct
import sys
import time

if __name__ == '__main__':
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from mixln_jax.distributed import rollcall  # noqa: E402

DIGEST = 'digest'
OTHERS = rollcall._Keys.derive('', 'another digest')  # what anybody can compute where there is no secret


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as server:
        return server.getsockname()[1]


def until_there(port):
    for _ in range(500):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(('127.0.0.1', port), 5)
        time.sleep(0.005)
    raise AssertionError(f'nobody listens at {port}')


def says(*pieces, pause=0.0, then=None):
    """Says something and stays, unless `then` is done to its connection."""

    def visit(port):
        connection = until_there(port)
        with contextlib.suppress(OSError):  # it is turned away while it speaks
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
            if then:
                then(connection)
        return [connection]

    return visit


def hello(number='1', count='2', keys=OTHERS, *, change=lambda line: line, nonce=None):
    """A hello as ours is, with the proofs of `keys`."""

    def visit(port):
        connection = until_there(port)
        given = rollcall._line(connection, time.monotonic() + 5).decode()
        words = nonce or given, '0' * 32, number, count
        proofs = [rollcall._proof(key, 'hello', *words) for key in (keys.member, keys.equal)]
        connection.sendall(change(' '.join([number, count, '0' * 32, *proofs]).encode() + b'\n'))
        return [connection]

    return visit


def many(count, visit):
    def visits(port):
        return [connection for _ in range(count) for connection in visit(port)]

    return visits


def replayed(port):
    """What a real process 1 has said to somebody else, whose nonce was another."""
    with socket.create_server(('127.0.0.1', 0)) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        address = f'127.0.0.1:{server.getsockname()[1]}'
        lured = pool.submit(rollcall.roll_call, address, 2, 1, 0.1, DIGEST)
        with server.accept()[0] as connection:
            connection.sendall(b'0' * 32 + b'\n')
            heard = rollcall._line(connection, time.monotonic() + 5) + b'\n'
        server.close()
        lured.exception()
    return says(heard)(port)


def old(**changes):
    """The line of versions before, in JSON."""
    return says(json.dumps({'number': 1, 'count': 2, 'digest': DIGEST} | changes).encode() + b'\n')


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    connection.close()


VISITORS = {
    'silent': says(),
    'a byte now and then': says(*[b'x'] * 5, pause=0.02),
    'digits without end': says(b'1' * 1_000_000),
    'lines without end': says(b'1 2 3\n' * 100_000),
    'HTTP': says(b'GET / HTTP/1.1\r\nHost: x\r\n\r\n'),
    'TLS': says(b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03' + bytes(500)),
    'SSH': says(b'SSH-2.0-OpenSSH_9.6\r\n'),
    'random bytes': says(os.urandom(3000)),
    'zeros': says(bytes(3000)),
    'an empty line': says(b'\n'),
    'connects and closes': says(then=socket.socket.close),
    'connects and resets': says(then=reset),
    'half closes': says(then=lambda connection: connection.shutdown(socket.SHUT_WR)),
    'half closes the other half': says(then=lambda connection: connection.shutdown(socket.SHUT_RD)),
    'half a line, then closes': says(b'1 2 0000', then=socket.socket.close),
    'a sniffed digest': old(),
    'JSON, a list': old(number=[1]),
    'JSON, a boolean': old(number=True),
    'JSON, 4,000 digits': says(b'{"number": ' + b'9' * 3900 + b'}\n'),
    'JSON, not a number': old(number=float('nan')),
    'JSON, 100,000 deep': says(b'[' * 100_000 + b'\n'),
    'JSON, 1,000 deep': says(b'[' * 1000 + b'\n'),
    'our shape, no proof': says(b'1 2 ' + b'0' * 32 + b' ' + b'0' * 64 + b' ' + b'0' * 64 + b'\n'),
    'another digest': hello(),
    'another digest, five times': many(5, hello()),
    'another digest and count': hello(count='3'),
    'another digest, number 0': hello('0'),
    'a number too large': hello('2'),
    'a very large number': hello('999999', '999999'),
    'a number of 4,000 digits': hello('9' * 3700),
    'a negative number': hello('-1'),
    'a number of Arabic digits': says('١ ٢ '.encode() + b'0' * 98 + b'\n'),
    'a number with a sign and a line after it': hello('+1\n1'),
    'another secret': hello(keys=rollcall._Keys.derive('secret', DIGEST)),
    'a nonce of its own': hello(keys=rollcall._Keys.derive('', DIGEST), nonce='1' * 32),
    'proofs cut short': hello(keys=rollcall._Keys.derive('', DIGEST), change=lambda line: line[:-2] + b'\n'),
    'proofs the other way round': hello(keys=rollcall._Keys(*[rollcall._Keys.derive('', DIGEST).equal] * 2, False)),
    'two lines at once': hello(keys=rollcall._Keys.derive('', DIGEST), change=lambda line: line * 2),
    'a replayed hello': replayed,
    '200 silent ones': many(200, says()),
    '250 that leave': many(250, says(b'x\n', then=socket.socket.close)),
}


def listens(*pieces, then=socket.socket.close, times=1):
    """In the place of process 0, to whom comes: says something, then hangs up."""

    def answer(port):
        with socket.create_server(('127.0.0.1', port)) as server:
            for _ in range(times):
                connection, _ = server.accept()
                with contextlib.suppress(OSError):
                    for piece in pieces:
                        connection.sendall(piece(connection) if callable(piece) else piece)
                then(connection)

    return answer


def claim(text, keys=OTHERS):
    """After a nonce: a line with the proof of `keys`."""

    def line(connection):
        number, count, nonce, *_ = rollcall._line(connection, time.monotonic() + 5).decode().split()
        return rollcall._signed(keys.member, ('0' * 32, nonce, number, count), text)

    return line


NONCE = b'0' * 32 + b'\n'
FAKES = {
    'hangs up': listens(),
    'is silent': listens(then=lambda connection: (time.sleep(0.4), connection.close())),
    'HTTP': listens(b'HTTP/1.1 400 Bad Request\r\n\r\n'),
    'without end': listens(b'0' * 1_000_000),
    'old: all are there': listens(b'""\n'),
    'old: not alike': listens(b'"not alike: two are number 1"\n'),
    'JSON, 100,000 deep': listens(b'[' * 100_000 + b'\n'),
    'a nonce, then silence': listens(NONCE, then=lambda connection: (time.sleep(0.4), connection.close())),
    'a nonce, then no proof': listens(NONCE, b'0' * 64 + b' all are there\n'),
    'a nonce, then bytes that are not ASCII': listens(NONCE, b'\xff' * 64 + b' all are there\n'),
    'a nonce, then what it heard': listens(NONCE, lambda connection: connection.recv(4000)),
    'claims that all are there': listens(NONCE, claim(rollcall.ALL)),
    'claims a welcome': listens(NONCE, claim(rollcall.WELCOME)),
    'claims that they differ': listens(NONCE, claim(f'{rollcall.DIFFERENT} two are number 1')),
    'claims that some are missing': listens(NONCE, claim('missing: 1 of 0 to 1'), times=2),
}


def met(kind, secret='', timeout=20.0):
    """What the roll call gives processes 0 and 1, with a stranger there before process 1: connections or errors."""
    port = free_port()

    def process(number):
        try:
            return rollcall.roll_call(f'127.0.0.1:{port}', 2, number, timeout, DIGEST, secret)
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor() as pool, contextlib.ExitStack() as closing:
        if kind in VISITORS:
            zero = pool.submit(process, 0)
            for connection in VISITORS[kind](port):
                closing.callback(connection.close)
            one = pool.submit(process, 1)
        else:
            fake = pool.submit(FAKES[kind], port)
            one = pool.submit(process, 1)
            fake.result()
            zero = pool.submit(process, 0)
        found = [zero.result(), one.result()]
    for connection in [connection for peers in found if isinstance(peers, dict) for connection in peers.values()]:
        connection.close()
    return found


KINDS = [*VISITORS, *(f'process 0: {kind}' for kind in FAKES)]
if __name__ == '__main__':
    rollcall.SOON = 0.3
    good = [[*map(type, met(kind))] == [dict, dict] for kind in [*VISITORS, *FAKES]]
    print(f'strangers: {len(good)} tried, {sum(good)} met')
    sys.exit(not all(good))
