"""The tensors of a Hugging Face folder: model.safetensors, or shards with an index. Pickles are never opened."""

import json
import pathlib

import huggingface_hub
import numpy as np
import safetensors.numpy

from mixln_jax.exits import CheckpointError, UsageError

FILE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
PICKLED = ('*.bin', '*.bin.index.json', '*.pt', '*.pth', '*.pkl', '*.ckpt')


def refuse_pickled(folder):
    """Raises CheckpointError for a folder whose only weights are pickles: who opens one runs what it says."""
    names = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if names and not any(folder.glob('*.safetensors*')):
        raise CheckpointError(f'{folder} has {names[0]}, a pickle, which is never opened here: safetensors is needed')


def read(folder):
    """{name: array} of a folder, in the types that the files have.

    Raises:
        UsageError: neither file nor index.
        CheckpointError: unreadable, a shard missing or of other tensors than the index says, only pickles.
    """
    refuse_pickled(folder)
    if (folder / FILE).exists() or not (folder / INDEX).exists():
        return _read_file(folder / FILE)
    tensors = {}
    for file, names in _read_index(folder / INDEX).items():
        if not (folder / file).is_file():
            raise CheckpointError(f'{folder / INDEX} names {file}, which is not there')
        found = _read_file(folder / file)
        if differ := sorted(names ^ found.keys()):
            says = 'lacks' if differ[0] in names else 'holds'
            puts = 'puts' if differ[0] in names else 'does not put'
            raise CheckpointError(f'{folder / file} {says} tensor {differ[0]}, which {INDEX} {puts} there')
        tensors |= found
    return tensors


def write(folder, tensors, dtype, max_bytes):
    """Writes {name: array} as `dtype`, in shards with an index where more than `max_bytes`; a tensor is never split."""
    split = huggingface_hub.split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda array: array.size * dtype.itemsize,
        filename_pattern='model{suffix}.safetensors',
        max_shard_size=max_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: np.asarray(tensors[name]).astype(dtype, order='C') for name in names}  # converted one at a time
        safetensors.numpy.save_file(shard, folder / file, metadata={'format': 'pt'})
    if split.is_sharded:
        index = {'metadata': split.metadata, 'weight_map': split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + '\n')


def _read_file(path):
    try:
        return safetensors.numpy.load_file(path)
    except FileNotFoundError:
        raise UsageError(f'{path} does not exist') from None
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f'{path} is not a readable safetensors file: {error}') from None


def _read_index(path):
    """{file: names of its tensors}."""
    try:
        where = json.loads(path.read_text())['weight_map'].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f'{path} is not a readable index: {error!r}') from None
    files = {}
    for name, file in where:
        # Also no absolute path: an index from elsewhere must not open files beside its folder.
        if not isinstance(file, str) or file != pathlib.PurePath(file).name or file == '..':
            raise CheckpointError(f'{path}: {name} is in {file!r}, which is not a file of this folder')
        files.setdefault(file, set()).add(name)
    return files
