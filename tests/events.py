"""TensorBoard's event files as TensorBoard reads them: framing, checksums, and what a restart makes it forget."""

import io
import struct

import numpy as np
from PIL import Image
from tensorboardX.proto import event_pb2


def read(folder):
    """({tag: [(step, number)]}, {tag: [(step, pixels)]}) of all event files of a folder, in the order of their names.

    A session that starts at step s makes TensorBoard forget everything from step s on. Raises AssertionError for a
    record whose checksum is wrong.
    """
    scalars, images = {}, {}
    for path in sorted(folder.glob('events.out.tfevents.*')):
        for event in map(event_pb2.Event.FromString, records(path.read_bytes())):
            if event.session_log.status == event_pb2.SessionLog.START:
                for found in (scalars, images):
                    for tag in found:
                        found[tag] = [(step, value) for step, value in found[tag] if step < event.step]
            for value in event.summary.value:
                if value.HasField('image'):
                    pixels = np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)))
                    images.setdefault(value.tag, []).append((event.step, pixels))
                else:
                    scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars, images


def records(content):
    """The records of a TFRecord file: length (8 bytes), its checksum (4), what is stored, its checksum (4)."""
    at = 0
    while at < len(content):
        head = content[at : at + 8]
        [size] = struct.unpack('<Q', head)
        stored = content[at + 12 : at + 12 + size]
        assert content[at + 8 : at + 12] == masked_crc(head) and content[at + 12 + size : at + 16 + size] == masked_crc(
            stored
        )
        yield stored
        at += 16 + size


def masked_crc(content):
    """CRC-32C (Castagnoli), turned and shifted as TFRecord has it."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return struct.pack('<I', ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def of_lines(lines, pictures=()):
    """What TensorBoard is to show of metrics lines, {tag: [(step, number)]}: a list has a tag an element, from 001;
    what is not known has no point."""
    expected = {}
    for line in lines:
        for name, value in line.items():
            if name == 'step' or name in pictures:
                continue
            many = {f'{name}/{number:03}': item for number, item in enumerate(value, 1)} if type(value) is list else {}
            for tag, item in (many or {name: value}).items():
                if item is not None:
                    expected.setdefault(tag, []).append((line['step'], float(np.float32(item))))
    return expected
