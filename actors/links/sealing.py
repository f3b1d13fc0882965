"""Who may talk over a connection, and how what they say is sealed.

Both ends of a `tcp` link hold the same secret of 32 bytes, which the engine has minted for this
link and epoch and handed to them through Ray. A connection begins with a challenge, so that each
end knows that the other holds the secret, and that nobody replays an earlier connection:

    receiver -> sender: 32 random bytes R
    sender -> receiver: 32 random bytes S, HMAC-SHA256(secret, "sender", R, S, name of the link)
    receiver -> sender: HMAC-SHA256(secret, "receiver", R, S, name)

The key of the records is HKDF-SHA256(secret, salt R + S): another one for every connection, and a
connection carries records one way. A sealed record is its length (8 bytes, little-endian), then
AES-256-GCM of it with the tag; the length is authenticated too, and the nonce is the record's
number, so that a record that is changed, repeated, left out or moved does not open.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from raygraft.actors.records import Record, decode, encode_into
from raygraft.graph.errors import LinkError

SECRET_BYTES = 32
_RANDOM_BYTES = 32
_PROOF_BYTES = 32
_LENGTH = struct.Struct("<Q")
_NONCE = struct.Struct("<4xQ")
_TAG_BYTES = 16
_PURPOSE = b"raygraft tcp link, version 1, "


def new_secret() -> bytes:
    """A secret for one link of one epoch."""
    return secrets.token_bytes(SECRET_BYTES)


def admit(connection: socket.socket, secret: bytes, name: str, record_bytes: int) -> Opener | None:
    """The receiver's side of the challenge; None for a peer that does not hold the secret.

    Raises OSError when the connection breaks or its timeout passes.
    """
    ours = os.urandom(_RANDOM_BYTES)
    connection.sendall(ours)
    theirs = _exactly(connection, _RANDOM_BYTES)
    proof = _exactly(connection, _PROOF_BYTES)
    if not hmac.compare_digest(proof, _proof(secret, b"sender", ours + theirs, name)):
        return None
    connection.sendall(_proof(secret, b"receiver", ours + theirs, name))
    return Opener(_key(secret, ours + theirs, name), record_bytes)


def ask_in(connection: socket.socket, secret: bytes, name: str, record_bytes: int) -> Sealer | None:
    """The sender's side of the challenge; None for a peer that does not hold the secret.

    Raises OSError when the peer refuses, the connection breaks, or its timeout passes.
    """
    theirs = _exactly(connection, _RANDOM_BYTES)
    ours = os.urandom(_RANDOM_BYTES)
    connection.sendall(ours + _proof(secret, b"sender", theirs + ours, name))
    proof = _exactly(connection, _PROOF_BYTES)
    if not hmac.compare_digest(proof, _proof(secret, b"receiver", theirs + ours, name)):
        return None
    return Sealer(_key(secret, theirs + ours, name), record_bytes)


class Sealer:
    """Seals records of at most `record_bytes` bytes, each with the next number."""

    def __init__(self, key: bytes, record_bytes: int) -> None:
        self._cipher = AESGCM(key)
        self._number = 0
        self._plain = memoryview(bytearray(record_bytes))
        self._sealed = memoryview(bytearray(_sealed_bytes(record_bytes)))
        self._length = self._sealed[: _LENGTH.size]
        self._views = _Views(self._sealed, self._plain)

    def seal(self, record: Record) -> memoryview:
        """The sealed record, which the next call overwrites.

        Raises LinkError when the record is larger than was agreed on.
        """
        length = encode_into(record, self._plain)
        frame, contents, plain = self._views.of(length)
        _LENGTH.pack_into(self._sealed, 0, length)
        self._cipher.encrypt_into(_NONCE.pack(self._number), plain, self._length, contents)
        self._number += 1
        return frame


class Opener:
    """Takes bytes as they come, and opens the records in them in the order of their sealing."""

    def __init__(self, key: bytes, record_bytes: int) -> None:
        self._cipher = AESGCM(key)
        self._number = 0
        self._record_bytes = record_bytes
        self._plain = memoryview(bytearray(record_bytes))
        self._arrived = memoryview(bytearray(_sealed_bytes(record_bytes)))
        self._views = _Views(self._arrived, self._plain)
        self._begin = self._end = 0

    def room(self) -> memoryview:
        """Where the bytes go that come next: after `open_next`, never empty."""
        if self._begin:
            kept = self._end - self._begin
            self._arrived[:kept] = self._arrived[self._begin : self._end]
            self._begin, self._end = 0, kept
        return self._arrived[self._end :] if self._end else self._arrived

    def add(self, count: int) -> None:
        """So many bytes have come."""
        self._end += count

    def open_next(self) -> Record | None:
        """The next record, None while it has not come as a whole.

        Raises LinkError when it is not what the sender sealed next.
        """
        begin = self._begin
        there = self._end - begin
        if there < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._arrived, begin)
        if length > self._record_bytes:
            largest = self._record_bytes
            raise LinkError(f"a record of {length} bytes was announced, {largest} were agreed on")
        size = _sealed_bytes(length)
        if there < size:
            return None
        views = self._views if begin == 0 else _Views(self._arrived[begin:], self._plain)
        frame, contents, plain = views.of(length)
        nonce = _NONCE.pack(self._number)
        try:
            self._cipher.decrypt_into(nonce, contents, frame[: _LENGTH.size], plain)
        except InvalidTag:
            raise LinkError(
                f"record {self._number} of this connection is not what its sender sealed"
            ) from None
        self._number += 1
        self._begin = begin + size
        if self._begin == self._end:
            self._begin = self._end = 0
        return decode(plain)


class _Views:
    """Views of a sealed and a plain buffer; records of one size mostly follow each other."""

    def __init__(self, sealed: memoryview, plain: memoryview) -> None:
        self._sealed = sealed
        self._plain = plain
        self._length = -1
        self._latest: tuple[memoryview, memoryview, memoryview]

    def of(self, length: int) -> tuple[memoryview, memoryview, memoryview]:
        """The whole frame; its contents with the tag; the plain record."""
        if length != self._length:
            frame = self._sealed[: _sealed_bytes(length)]
            self._latest = frame, frame[_LENGTH.size :], self._plain[:length]
            self._length = length
        return self._latest


def _sealed_bytes(length: int) -> int:
    return _LENGTH.size + length + _TAG_BYTES


def _proof(secret: bytes, who: bytes, randoms: bytes, name: str) -> bytes:
    return hmac.digest(secret, _PURPOSE + who + randoms + name.encode(), "sha256")


def _key(secret: bytes, randoms: bytes, name: str) -> bytes:
    derivation = HKDF(SHA256(), 32, salt=randoms, info=_PURPOSE + b"records" + name.encode())
    key: bytes = derivation.derive(secret)
    return key


def _exactly(connection: socket.socket, count: int) -> bytes:
    """The next `count` bytes. Raises ConnectionError when the peer hangs up before."""
    arrived = b""
    while len(arrived) < count:
        more = connection.recv(count - len(arrived))
        if not more:
            raise ConnectionError("the peer hung up")
        arrived += more
    return arrived
