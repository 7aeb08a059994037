"""The tensors of a Hugging Face folder: model.safetensors, or shards with an index. Pickles are never opened."""

import json
import pathlib

import huggingface_hub
import jax
import numpy as np
import safetensors.numpy

from mixln_jax import trees
from mixln_jax.exits import CheckpointError, UsageError
from mixln_jax.models import transformer

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


def by_layer(params, norm_position):
    """Parameters with L single layers in place of the stack, as a folder has them."""
    return dict(params, layers=transformer.split_layers(params[trees.STACKED], norm_position))


def fill(folder, found, shapes, norm_position, tensor_name, network):
    """The parameters of a network, from what `read` found.

    Args:
        folder: where that was, for errors.
        found: {name: array}, which is emptied, so that few tensors are held twice.
        shapes: the parameters as ShapeDtypeStructs, with the sizes that the folder has.
        norm_position: placement name of each layer.
        tensor_name: a leaf's path by layer, joined by slashes -> name of its tensor; a kernel is stored transposed.
        network: what these names follow from, for errors.

    Returns:
        The tree in float32 numpy arrays.

    Raises:
        CheckpointError: a tensor missing, left over, of another shape, or not finite numbers, naming it.
    """

    def take(path, leaf):
        path = trees.path_name(path)
        name = tensor_name(path)
        if name not in found:
            raise CheckpointError(f'{folder}: no tensor {name}, which {network} needs')
        tensor = found.pop(name)
        if tensor.dtype.kind in 'iub' or not np.isfinite(tensor := tensor.astype(np.float32)).all():
            raise CheckpointError(f'{folder}: tensor {name} is not finite numbers ({tensor.dtype})')
        tensor = tensor.T if path.endswith('kernel') else tensor
        if tensor.shape != leaf.shape:
            raise CheckpointError(
                f'{folder}: tensor {name} has shape {tensor.shape}, config.json makes it {leaf.shape}'
            )
        return tensor

    params = jax.tree_util.tree_map_with_path(take, jax.eval_shape(lambda p: by_layer(p, norm_position), shapes))
    if found:
        raise CheckpointError(f'{folder}: tensor {min(found)} has no place in a network with {network}')
    return dict(params, layers=transformer.stack_layers(params[trees.STACKED], norm_position))


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
