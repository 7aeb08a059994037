"""Fetches the files of tokenizers, with limits on their size, on the time, and on redirects."""

import http.client
import time
import urllib.error
import urllib.request
from http.client import HTTPMessage
from typing import IO, Any

from mixln_jax.data import text_files
from mixln_jax.system.errors import DataError, first_line

TIMEOUT = 25  # seconds until a server must answer, and between two parts of its answer
WHOLE = 300  # seconds until the whole answer must have arrived
LARGEST = 64 * 10**6  # bytes


def fetch(url: str, absent: bytes | None = None) -> bytes:
    """Returns the content of a URL.

    Args:
        url: to fetch.
        absent: returned if the server answers that the file does not exist; None: that is an error too.

    Raises:
        DataError: the URL, which is named, cannot be fetched, or its content does not arrive whole and in time.
    """
    deadline = time.monotonic() + WHOLE
    try:
        # Name resolution, and trying the addresses one after the other, have no timeout of their own.
        opener = urllib.request.build_opener(_Redirects)
        answer = text_files.call_within(TIMEOUT, lambda: opener.open(url, timeout=TIMEOUT))
        return text_files.call_within(WHOLE, lambda: _received(answer, deadline))
    except urllib.error.HTTPError as error:
        if absent is not None and error.code in (403, 404, 410):  # 403: from buckets that do not list their objects
            return absent
        reason = f'{error.code} {error.reason}'
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = first_line(error)
    raise DataError(f'{url} cannot be fetched: {reason}; fetch it elsewhere, then --config.data.tokenizer_path=FILE')


def _received(answer: Any, deadline: float) -> bytes:
    """Returns the body of an answer. Raises ValueError if it is too long, takes too long or is cut short."""
    body = bytearray()
    with answer:
        while piece := answer.read1(2**16):
            body += piece
            if len(body) > LARGEST:
                raise ValueError(f'more than {LARGEST:,} bytes, too much for a tokenizer')
            if time.monotonic() > deadline:
                raise ValueError(f'it has not arrived after {WHOLE:g} s')
    stated = answer.headers.get('Content-Length')
    if stated is not None and int(stated) != len(body):
        raise ValueError(f'{len(body):,} bytes arrived, but the server announced {stated}')
    return bytes(body)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to a protocol that others can read and change."""

    def redirect_request(
        self, request: urllib.request.Request, file: IO[bytes], code: int, reason: str, headers: HTTPMessage, url: str
    ) -> urllib.request.Request | None:
        if request.type == 'https' and not url.lower().startswith('https:'):
            raise ValueError(f'it redirects to {url}, which is not https')
        return super().redirect_request(request, file, code, reason, headers, url)
