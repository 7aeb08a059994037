"""What a step of a run on images saw: which images, and a sheet of all of them as they were varied."""

import io
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mixln_jax import config as configs
from mixln_jax.data import batches, rows

SMALLEST = 96  # pixels of a side on the sheet; smaller images are enlarged
GAP, LINE = 4, 14  # pixels between images, and of a line of text
LONGEST = 10**4  # pixels of a side of the sheet


def inspect(
    workdir: pathlib.Path, config: configs.Config, places: np.ndarray, data_path: str | None = None
) -> tuple[list[dict[str, Any]], bytes]:
    """Returns what a run saw at some places of its stream: a dict for each (`row`, `origin`, `label`, `class`), and the
    contact sheet as PNG.

    Raises UsageError and DataError as `rows.open_rows_of_run`.
    """
    made = rows.open_rows_of_run(workdir, config, config.data.split, None, data_path)
    batch = batches.batch_at(made, config.data.seed, places)
    numbers = batches.order(made, config.data.seed, places).tolist()
    found = [
        {'row': i, 'origin': made.origin(number), 'label': label, 'class': made.classes[label]}
        for i, (number, label) in enumerate(zip(numbers, batch['labels'].tolist(), strict=True))
    ]
    return found, draw(batch['images'], [f'{row["row"]}: {row["class"]}' for row in found])


def draw(images: np.ndarray, captions: Sequence[str]) -> bytes:
    """Returns a PNG of images [n, S, S, 3] uint8 in rows, with a line of text below each; as many as fit."""
    side = images.shape[1] * math.ceil(SMALLEST / images.shape[1])
    width, height = side + GAP, side + LINE + GAP
    columns = max(1, min(math.ceil(math.sqrt(len(images))), LONGEST // width))
    shown = min(len(images), columns * max(1, LONGEST // height))
    sheet = Image.new('RGB', (columns * width + GAP, math.ceil(shown / columns) * height + GAP), 'white')
    pen = ImageDraw.Draw(sheet)
    for (left, top), pixels, caption in zip(_places(columns, width, height), images[:shown], captions, strict=False):
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (left, top))
        text = caption.encode('ascii', 'replace').decode()
        while pen.textlength(text) > side and len(text) > 1:
            text = text[:-1]
        pen.text((left, top + side + 1), text, fill='black')
    file = io.BytesIO()
    sheet.save(file, 'PNG')
    return file.getvalue()


def _places(columns: int, width: int, height: int) -> Iterator[tuple[int, int]]:
    number = 0
    while True:
        yield GAP + number % columns * width, GAP + number // columns * height
        number += 1
