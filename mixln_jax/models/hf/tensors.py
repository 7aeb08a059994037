"""The tensors of a Hugging Face folder: model.safetensors, or shards with an index. Pickles are never opened."""

import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from mixln_jax import trees
from mixln_jax.models import transformer
from mixln_jax.system import files
from mixln_jax.system.errors import CheckpointError, UsageError, reading

FILE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
DTYPES = ('float32', 'bfloat16')  # of what is written
PICKLED = ('*.bin', '*.bin.index.json', '*.pt', '*.pth', '*.pkl', '*.ckpt')
# Parts that torch puts into names of tensors: data parallelism, torch.compile, FSDP, recomputation.
WRAPPERS = {'module', '_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module'}
# Buffers with counts: pattern of the name -> what they hold, and a function that returns it, given the tensor.
COUNTS: dict[str, tuple[str, Callable[[np.ndarray], Any]]] = {
    r'(.*\.)?position_ids': ('positions from 0', lambda tensor: np.arange(tensor.shape[-1])),
    r'(.*\.)?token_type_ids': ('zeros', np.zeros_like),
}


def refuse_others(folder: pathlib.Path) -> None:
    """Raises for a folder that is not Hugging Face's.

    Raises:
        UsageError: it is a run or a checkpoint of ours.
        CheckpointError: its only weights are pickles, which run code when they are opened.
    """
    if any(folder.glob('*.safetensors*')):
        return
    if (folder / 'checkpoints').is_dir() or (folder / 'about').is_dir():
        raise UsageError(f'{folder} is a run or a checkpoint of ours, which mixln_jax.load opens')
    if names := sorted(path.name for pattern in PICKLED for path in folder.glob(pattern)):
        raise CheckpointError(f'{folder} has {names[0]}, a pickle, which is never opened here: safetensors is needed')


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns {name: array} of a folder, in the types of the files, with names without WRAPPERS.

    Raises:
        UsageError: neither file nor index, or a run of ours.
        CheckpointError: unreadable; a shard that is missing or has other tensors than the index says; only pickles.
    """
    refuse_others(folder)
    if (folder / FILE).exists() or not (folder / INDEX).exists():
        return _unwrapped(folder, _read_file(folder / FILE))
    tensors: dict[str, np.ndarray] = {}
    for file, names in _read_index(folder / INDEX).items():
        if not (folder / file).is_file():
            raise CheckpointError(f'{folder / INDEX} names {file}, which is not there')
        shard = _read_file(folder / file)
        if differ := sorted(names ^ shard.keys()):
            verb = 'lacks' if differ[0] in names else 'holds'
            puts = 'puts' if differ[0] in names else 'does not put'
            raise CheckpointError(f'{folder / file} {verb} tensor {differ[0]}, which {INDEX} {puts} there')
        tensors |= shard
    return _unwrapped(folder, tensors)


def _unwrapped(folder: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    named = {}
    for name, tensor in tensors.items():
        plain = '.'.join(part for part in name.split('.') if part not in WRAPPERS)
        if plain in named:
            raise CheckpointError(f'{folder} holds the tensor {plain} twice, once as {name}')
        named[plain] = tensor
    return named


def drop_buffers(
    folder: pathlib.Path, arrays: dict[str, np.ndarray], buffers: Mapping[str, tuple[str, Callable[[np.ndarray], Any]]]
) -> None:
    """Removes buffers, which are not weights, from what `read` returned, if they hold what the network computes itself.

    Args:
        folder: of the arrays, for errors.
        arrays: {name: array}, which is changed.
        buffers: further buffers that this network may have, as COUNTS.

    Raises:
        CheckpointError: a buffer holds something else, naming it and what it should hold.
    """
    for name in sorted(arrays):
        for pattern, (what, expected) in {**COUNTS, **buffers}.items():
            if re.fullmatch(pattern, name):
                tensor = arrays.pop(name)
                try:
                    good = _is_close(tensor, expected(tensor))
                except (ValueError, IndexError, TypeError):  # its shape
                    good = False
                if not good:
                    raise CheckpointError(f'{folder}: tensor {name} does not hold {what}')


def _is_close(tensor: np.ndarray, expected: Any) -> bool:
    """Returns whether a buffer is `expected`, up to the rounding of its type and of float32, the type of most."""
    kind = jnp.finfo(tensor.dtype) if jnp.issubdtype(tensor.dtype, jnp.floating) else None
    rtol, atol = (max(float(kind.eps), 1e-5), float(kind.smallest_subnormal)) if kind else (0, 0)
    return bool(np.isclose(tensor.astype(np.float64), np.asarray(expected, np.float64), rtol, atol).all())


def by_layer(params: Any, norm_position: Sequence[str]) -> dict[str, Any]:
    """Returns parameters with L single layers in place of the stack, as a folder has them."""
    return dict(params, layers=transformer.split_layers(params[trees.STACKED], norm_position))


def fill(
    folder: pathlib.Path,
    arrays: dict[str, np.ndarray],
    shapes: Any,
    norm_position: Sequence[str],
    tensor_name: Callable[[str], str],
    network: str,
) -> dict[str, Any]:
    """Returns the parameters of a network, made of what `read` returned.

    Args:
        folder: of the arrays, for errors.
        arrays: {name: array}, which is emptied, so that few tensors are in memory twice.
        shapes: the parameters as ShapeDtypeStructs, with the sizes that the folder has.
        norm_position: placement name of each layer.
        tensor_name: returns the name of a leaf's tensor, given the leaf's path by layer, joined by slashes; kernels are
            stored transposed.
        network: describes the network, for errors.

    Returns:
        The tree in float32 numpy arrays.

    Raises:
        CheckpointError: a tensor missing, left over, of another shape, or not finite numbers, naming it.
    """

    def take(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        leaf_name = trees.path_name(path)
        name = tensor_name(leaf_name)
        if name not in arrays:
            raise CheckpointError(f'{folder}: no tensor {name}, which {network} needs')
        tensor = arrays.pop(name)
        if tensor.dtype.kind in 'iub' or not np.isfinite(tensor := tensor.astype(np.float32)).all():
            raise CheckpointError(f'{folder}: tensor {name} is not finite numbers ({tensor.dtype})')
        tensor = tensor.T if leaf_name.endswith('kernel') else tensor
        if tensor.shape != leaf.shape:
            raise CheckpointError(
                f'{folder}: tensor {name} has shape {tensor.shape}, config.json makes it {leaf.shape}'
            )
        return tensor

    params = jax.tree_util.tree_map_with_path(take, jax.eval_shape(lambda p: by_layer(p, norm_position), shapes))
    if arrays:
        raise CheckpointError(f'{folder}: tensor {min(arrays)} has no place in a network with {network}')
    return dict(params, layers=transformer.stack_layers(params[trees.STACKED], norm_position))


def check_options(dtype: str, max_shard_gb: float) -> None:
    """Raises UsageError for options with which nothing can be written."""
    if dtype not in DTYPES:
        raise UsageError(f'dtype={dtype!r} is not one of {", ".join(DTYPES)}')
    if not 0 < max_shard_gb < float('inf'):
        raise UsageError(f'max_shard_gb={max_shard_gb} must be above 0, and finite')


def make_empty(folder: pathlib.Path) -> None:
    """Makes a folder. Raises UsageError if there is something in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UsageError(f'{folder} is not empty')


def write(folder: pathlib.Path, tensors: dict[str, np.ndarray], dtype: Any, max_bytes: int) -> None:
    """Writes {name: array} as `dtype`: in shards with an index if it is more than `max_bytes`. No tensor is split."""
    split = huggingface_hub.split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda array: array.size * dtype.itemsize,
        filename_pattern='model{suffix}.safetensors',
        max_shard_size=max_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: np.asarray(tensors[name]).astype(dtype, order='C') for name in names}  # converted one at a time
        write_file(folder / file, shard)
    if split.is_sharded:
        index = {'metadata': split.metadata, 'weight_map': split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + '\n', encoding='utf-8')


def write_file(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file with the permissions of any new file; the library's own are for its owner alone."""
    path.touch()
    mode = path.stat().st_mode
    safetensors.numpy.save_file(tensors, path, metadata={'format': 'pt'})
    path.chmod(mode)


def _read_file(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        files.regular(path, CheckpointError)
    except FileNotFoundError:
        raise UsageError(f'{path} does not exist') from None
    with reading(path, CheckpointError, 'not a readable safetensors file'):
        return safetensors.numpy.load_file(path)


def _read_index(path: pathlib.Path) -> dict[str, set[str]]:
    """Returns {file: names of its tensors}."""
    with reading(path, CheckpointError, 'not a readable index'):
        entries = files.read_json(path, CheckpointError, 'not a readable index')['weight_map'].items()
    by_file: dict[str, set[str]] = {}
    for name, file in entries:
        # Also no absolute path: an index from elsewhere must not open files outside its folder.
        if not isinstance(file, str) or file != pathlib.PurePath(file).name or file == '..':
            raise CheckpointError(f'{path}: {name} is in {file!r}, which is not a file of this folder')
        by_file.setdefault(file, set()).add(name)
    return by_file
