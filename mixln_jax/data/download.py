"""Files of tokenizers that are fetched: how much may come, how long it may take, from where."""

import http.client
import time
import urllib.error
import urllib.request

from mixln_jax.data import text_files
from mixln_jax.system.errors import DataError, first_line

TIMEOUT = 25  # seconds until a server must answer, and between two pieces of what it sends
WHOLE = 300  # seconds until all of it must be there
LARGEST = 64 * 10**6  # bytes


def fetch(url: str, absent: bytes | None = None) -> bytes:
    """What a URL holds; `absent`, if given, where the server says that there is nothing.

    Raises DataError, naming the URL, where it cannot be fetched, or is not there, whole, in time.
    """
    deadline = time.monotonic() + WHOLE
    try:
        # Looking up a name and trying its addresses one by one know no time-out of their own.
        opener = urllib.request.build_opener(_Redirects)
        answer = text_files.within(TIMEOUT, lambda: opener.open(url, timeout=TIMEOUT))
        return text_files.within(WHOLE, lambda: _received(answer, deadline))
    except urllib.error.HTTPError as error:
        if absent is not None and error.code in (403, 404, 410):  # 403: buckets that do not list their objects
            return absent
        reason = f'{error.code} {error.reason}'
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = first_line(error)
    raise DataError(f'{url} cannot be fetched: {reason}; fetch it elsewhere, then --config.data.tokenizer_path=FILE')


def _received(answer, deadline):
    """The body of an answer. Raises ValueError for one that is too long, takes too long or is cut short."""
    body = bytearray()
    with answer:
        while piece := answer.read1(2**16):
            body += piece
            if len(body) > LARGEST:
                raise ValueError(f'more than {LARGEST:,} bytes, too much for a tokenizer')
            if time.monotonic() > deadline:
                raise ValueError(f'it is not there after {WHOLE:g} s')
    stated = answer.headers.get('Content-Length')
    if stated is not None and int(stated) != len(body):
        raise ValueError(f'{len(body):,} bytes came, not the {stated} that the server said')
    return bytes(body)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to what anyone on the way can read and change."""

    def redirect_request(self, request, file, code, reason, headers, url):
        if request.type == 'https' and not url.lower().startswith('https:'):
            raise ValueError(f'it sends us to {url}, which is not https')
        return super().redirect_request(request, file, code, reason, headers, url)
