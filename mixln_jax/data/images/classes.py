"""Classes and splits of images, as the names of their folders tell them."""

import dataclasses
import os
from collections.abc import Container, Sequence

import numpy as np

from mixln_jax.data import sources
from mixln_jax.data.images.files import KEY, Files
from mixln_jax.system.errors import DataError, UsageError
from mixln_jax.system.files import read as read_file

VALIDATION = ('validation', 'val', 'valid', 'test')  # folders next to train, the first of them counts
SPLITS = {'train', 'training', 'testing', *VALIDATION}


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Some of the files of a set: `numbers` [n] int64 in it, and the class of each, `labels` [n] int32."""

    files: Files
    classes: tuple[str, ...]
    numbers: np.ndarray
    labels: np.ndarray


def split(files: Files, name: str, held_out: float, validation: Files | None = None, listed: str = '') -> Labelled:
    """Returns the images of a split.

    A class is a folder. There is either a folder of classes for each split, one of them `train`, or there are folders
    of classes alone; of these, hashes of the files' names decide which are for validation, unless `validation` has
    others. A single folder around all that is looked through. Classes are in the order of their names.

    Args:
        files: all images.
        name: 'train', 'validation' (a folder of VALIDATION), 'all', or the name of another folder next to train.
        held_out: the share for validation where nothing else decides; 0: none.
        validation: other files to validate on.
        listed: a file with their classes, see `_by_list`; empty: folders tell them.

    Raises:
        UsageError: no such split.
        DataError: an image in no folder of a class, a folder of a class without images, a set of one class, splits
            with different classes.
    """
    splits = _by_folder(files)
    train = splits.pop('train')
    if validation and listed:
        splits['validation'] = _by_list(validation, listed, train.classes)
    elif validation:
        others = _by_folder(validation)
        splits['validation'] = next((others[name] for name in VALIDATION if name in others), others['train'])
    elif known := [other for other in VALIDATION if other in splits]:
        splits['validation'] = splits[known[0]]
    for other, part in splits.items():
        if part.classes != train.classes:
            raise DataError(f'{_place(part.files)}: {_difference(train.classes, part.classes)} (split {other})')
    if len(train.classes) < 2:
        raise DataError(
            f'{_place(train.files)}: all images are of the class {train.classes[0]}; two classes are needed'
        )
    if 'validation' not in splits and held_out:
        splits['validation'], train = _held_out(train, held_out)
    splits['train'] = train
    if name == 'all':
        numbers = [part for part in splits.values() if part.files is files]
        chosen, places = np.unique(np.concatenate([part.numbers for part in numbers]), return_index=True)
        return dataclasses.replace(train, numbers=chosen, labels=np.concatenate([p.labels for p in numbers])[places])
    if name not in splits:
        way = '; config.data.held_out=0 leaves none' if name == 'validation' else ''
        raise UsageError(f'{_place(train.files)} has no split {name}, only {", ".join(sorted(splits))} and all{way}')
    return splits[name]


def _by_folder(files: Files) -> dict[str, Labelled]:
    """Returns {split: its images}; without folders for splits all are for `train`."""
    skip = _depth(files)
    firsts = {name.split('/')[skip] for name in files.names}
    parted = 'train' in firsts
    if not parted and len(firsts) > 1 and all(name.lower() in SPLITS for name in firsts):
        raise DataError(
            f'{_place(files)}: the folders {", ".join(sorted(firsts))} have the names of splits, not of classes; call '
            'that of the images to train on train, and that of the others val'
        )
    groups: dict[str, tuple[list[int], list[str]]] = {}
    for number, name in enumerate(files.names):
        parts = name.split('/')[skip:]
        if len(parts) < 2 + parted:
            raise DataError(
                f'{files.origin(number)}: the image is in no folder of a class; there must be a folder for each class, '
                f'such as {"train/" if parted else ""}cat/1.jpg'
            )
        numbers, classes = groups.setdefault(parts[0] if parted else 'train', ([], []))
        numbers.append(number)
        classes.append(parts[parted])
    _check_folders(files, skip, parted, groups)
    made = {}
    for split, (numbers, classes) in groups.items():
        known, labels = np.unique(classes, return_inverse=True)
        for name in known.tolist():
            if not name.isprintable():  # JSON could not hold it, or a terminal would obey it
                raise DataError(f'{_place(files)}: the name of the class {name!r} cannot be shown; rename its folder')
        made[split] = Labelled(files, tuple(known.tolist()), np.array(numbers), labels.astype(np.int32))
    return made


def _by_list(files: Files, path: str, classes: Sequence[str]) -> Labelled:
    """Returns images whose classes are in a file: a line for each image in the order of their names, with the name of
    its class or, in any order, with its name and that of its class. ImageNet's val.tar has no folders.

    Raises DataError, naming file and line.
    """
    try:
        lines = read_file(path, DataError).decode(errors='replace').splitlines()
    except FileNotFoundError:
        raise DataError(f'{path}: there is no such file of classes') from None
    names = [name.rpartition('/')[2] for name in files.names]
    places, known = {name: i for i, name in enumerate(names)}, {name: i for i, name in enumerate(classes)}
    labels = np.full(len(names), -1, np.int32)
    if len(lines) != len(names):
        raise DataError(f'{path}: {len(lines):,} lines for {len(names):,} images of {files.origin(0)} and so on')
    for number, line in enumerate(lines):
        image, name = _named(line.strip(), names[number], known)
        if name not in known:
            raise DataError(f'{path}:{number + 1}: {line!r} does not end in the name of a class, such as {classes[0]}')
        if image not in places or labels[places[image]] >= 0:
            raise DataError(f'{path}:{number + 1}: {image} is not an image of its own')
        labels[places[image]] = known[name]
    return Labelled(files, tuple(classes), np.arange(len(names)), labels)


def _named(line: str, image: str, classes: Container[str]) -> tuple[str, str]:
    """Returns the name of an image and that of its class, of a line with both or with that of the class of `image`.

    Both may have blanks in them. Without a class it is the whole line.
    """
    blanks = [place for place, letter in enumerate(line) if letter.isspace()]
    halves = [(image, line), *((line[:place].rstrip(), line[place:].strip()) for place in blanks)]
    return next((half for half in halves if half[1] in classes), halves[0])


def _root(files: Files) -> str:
    """Returns where all files are, for people: the beginning of every `origin`."""
    return files.origin(0).removesuffix(files.names[0])


def _depth(files: Files) -> int:
    """Returns 1 if a single folder is around splits or classes, else 0."""
    first = files.names[0].split('/')[0]
    alone = all(name.startswith(f'{first}/') and name.count('/') >= 2 for name in files.names)
    return int(alone and first != 'train')


def _check_folders(files: Files, skip: int, parted: bool, groups: dict[str, tuple[list[int], list[str]]]) -> None:
    """Raises DataError for a folder of a class in which there is no image."""
    known = {(split, name) for split, (_, classes) in groups.items() for name in classes}
    for folder in files.folders:
        parts = folder.split('/')[skip:]
        if len(parts) == 1 + parted and (parts[0] if parted else 'train', parts[-1]) not in known:
            raise DataError(f'{_root(files)}{folder}: the folder of this class has no image; remove it, or fill it')


def _difference(train: Sequence[str], others: Sequence[str]) -> str:
    lacking, foreign = sorted({*train} - {*others}), sorted({*others} - {*train})
    parts = [f'has no class {_shown(lacking)}, which train has'] * bool(lacking)
    parts += [f'has the class {_shown(foreign)}, which train lacks'] * bool(foreign)
    return ' and '.join(parts)


def _shown(names: Sequence[str]) -> str:
    return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def _place(files: Files) -> str:
    return _root(files).rstrip(': /')


def _held_out(part: Labelled, share: float) -> tuple[Labelled, Labelled]:
    """Returns the images for validation and those for training, by hashes of their names."""
    ranks = [sources.rank(os.fsencode(part.files.names[number])) for number in part.numbers]
    if len(ranks) < 2:
        raise DataError(f'{_place(part.files)}: there is only one image; two are needed, one of them for validation')
    is_held = np.array(ranks, np.uint64) < np.uint64(sources.first_for_training(ranks, 1 / share, KEY))
    held, kept = (
        dataclasses.replace(part, numbers=part.numbers[mask], labels=part.labels[mask]) for mask in (is_held, ~is_held)
    )
    return held, kept
