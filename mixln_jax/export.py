"""Weights for other tools: `python -m mixln_jax.export --checkpoint DIR --out DIR` writes a Hugging Face folder.

Pre-LN networks become stock LLaMA, or stock ViT if their head reads a token and their positions are learned. All others
carry a small modelling file, which transformers runs with
`AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)`. Reward models are for
`AutoModelForSequenceClassification`, networks that read images for `AutoModelForImageClassification`, or with `--format
timm` for timm.
"""

from mixln_jax.system.signals import stop

if __name__ == '__main__':
    stop.install()  # before the imports, and for good: what is written is whole or not there

# ruff: noqa: E402
import argparse
import fnmatch
import os
import pathlib
import shutil
import sys
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np
import optax

from mixln_jax.data import chat
from mixln_jax.models import hf, vit
from mixln_jax.models.hf import config as hf_config
from mixln_jax.models.hf import llama as hf_llama
from mixln_jax.models.hf import peft, tensors
from mixln_jax.models.hf import vit as hf_vit
from mixln_jax.program import lora
from mixln_jax.runs import environment, start_weights, weights
from mixln_jax.runs.weights import Weights
from mixln_jax.system import cli, console, files, outputs
from mixln_jax.system.errors import CheckpointError, UsageError, reading

BESIDE = (
    'tokenizer*.json', 'tokenizer.model', 'spiece.model', 'special_tokens_map.json', 'vocab.json', 'merges.txt',
    'chat_template.jinja', 'generation_config.json', hf_vit.PROCESSOR,
)  # fmt: skip
OWN = (
    *BESIDE,
    'config.json',
    'model*.safetensors*',
    'modeling_*.py',
    'tokenizer/*',
    weights.EXPORT,
    peft.CONFIG,
    peft.WEIGHTS,
)
# The largest allowed difference of a logit, as a share of the largest logit, and of the perplexity, as a share of it.
BOUNDS = {'float32': 0.0, 'bfloat16': 0.05}


def export(
    checkpoint: str | os.PathLike,
    out: str,
    dtype: str = 'float32',
    max_shard_gb: float = 5.0,
    norm_position: str | None = None,
    remove_layers: Collection[int] = (),
    layout: str = hf_vit.TRANSFORMERS,
) -> None:
    """Writes the weights at `checkpoint`, which is anything that `weights.load` opens, into the folder `out`.

    It is written next to `out`, read back and compared, and then renamed, so `out` is never incomplete. If `out` is a
    link, its target is written. Layers of `remove_layers` are left out; see `weights.without_layers`. `layout` is whose
    folder a ViT's is, one of `hf.vit.LAYOUTS`.

    Raises:
        UsageError: `out` holds anything but an export, is the checkpoint, inside it or around it, or another process
            writes it; options that do not fit, or a network that cannot be written.
        CheckpointError: weights that cannot be read, or that differ when they are read back.
    """
    target = _target(checkpoint, out)
    with outputs.replacing(target, _check_replaceable) as partial:
        loaded = weights.load(checkpoint, norm_position=norm_position)
        source = pathlib.Path(loaded.where)
        if not loaded.model.causal and loaded.model.reads == 'texts':
            family = loaded.model.config.family
            raise CheckpointError(
                f'{source}: a network of the family {family} cannot be written as a Hugging Face folder'
            )
        if remove_layers:
            loaded = weights.without_layers(loaded, remove_layers)
        if isinstance(loaded.model, vit.ViT):
            images = loaded.config.data.images if loaded.config else None
            names = loaded.class_names
            hf_vit.save(partial, loaded.model, loaded.params, dtype, max_shard_gb, names, images, layout)
        elif layout != hf_vit.TRANSFORMERS:
            raise UsageError(f'--format {layout}: {source} is not a ViT, which alone is written so: leave out --format')
        else:
            about = {'max_position_embeddings': loaded.config.seq_length} if loaded.config else _about(source)
            hf_llama.save(partial, loaded.model, loaded.params, loaded.tokenizer, dtype, max_shard_gb, about)
        if not loaded.config:
            patterns = [pattern for pattern in BESIDE if layout == hf_vit.TRANSFORMERS or pattern != hf_vit.PROCESSOR]
            for path in (path for pattern in patterns for path in source.glob(pattern)):
                files.regular(path, CheckpointError)
                shutil.copy(path, partial)
        elif loaded.template in chat.NAMED and (partial / 'tokenizer.json').exists():
            outputs.write(partial / 'chat_template.jinja', chat.portable(loaded.template).encode())
        compared = _check(partial, loaded, dtype)
        names = sorted(str(path.relative_to(partial)) for path in partial.rglob('*') if path.is_file())
        origin: dict[str, Any] = {'from': loaded.where, 'step': loaded.step, 'removed_layers': sorted({*remove_layers})}
        origin |= {'data_mode': loaded.data_mode, 'dtype': dtype, 'versions': environment.versions()}
        origin |= {'tokenizer': loaded.tokenizer.fingerprint if loaded.tokenizer else None}
        origin |= {'template': loaded.template}
        outputs.write_json(partial / weights.EXPORT, origin | {'files': [*names, weights.EXPORT]})
    size = sum(path.stat().st_size for path in target.rglob('*'))
    console.say(f'{target}: {len(names) + 1} files, {size:,} bytes')
    if loaded.tokenizer and not (target / 'tokenizer.json').exists():
        console.say('its tokenizer cannot be said as a tokenizer.json; tokenizer/ holds it as it is')
    console.say(compared)


def export_adapter(checkpoint: str | os.PathLike, out: str) -> None:
    """Writes the adapters of a run into the folder `out`, as peft reads them; see `export`.

    Raises:
        UsageError: as `export`; not a run that trains adapters alone, or not one of stock LLaMA.
        CheckpointError: weights that cannot be read, or that are others when read back.
    """
    target = _target(checkpoint, out)
    with outputs.replacing(target, _check_replaceable) as partial:
        found = weights.load(checkpoint, merge=False)
        if found.model.num_outputs:
            raise UsageError(
                f'--adapter: {found.where} has trained its head too, which adapters cannot hold: leave out --adapter'
            )
        if not found.config or found.config.tune.method != 'lora' or found.config.tune.train:
            raise UsageError(
                f'--adapter: {found.where} is not a run that trains adapters alone '
                '(config.tune.method=lora, config.tune.train empty)'
            )
        tune, init_from, network = found.config.tune, found.config.init_from, jax.device_get(found.params)
        base = os.path.abspath(init_from.removeprefix('hf:')) if init_from.startswith('hf:') else None
        peft.save(partial, found.model, network, tune, base)
        plain = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), lora.base(network))
        again = peft.merged(partial, peft.read_config(partial), found.model, plain)
        expected = jax.device_get(lora.merged(network))
        apart = max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (again, expected)), strict=True))
        if not apart <= 1e-5:
            raise CheckpointError(f'{found.where}: read back, its merged weights differ by {apart:.3g}')
        origin = {'from': found.where, 'step': found.step, 'versions': environment.versions()}
        origin |= {'base': start_weights.base_fingerprint(plain, tune.base_dtype), 'base_dtype': tune.base_dtype}
        outputs.write_json(partial / weights.EXPORT, origin | {'files': [peft.CONFIG, peft.WEIGHTS, weights.EXPORT]})
    console.say(f'{target}: the adapters of {found.where}, rank {tune.rank}; read back and compared')
    if not base:
        console.say(
            f'their base is that of config.init_from={init_from}: export it, and write its folder as {peft.BASE} into '
            f'{target / peft.CONFIG}'
        )


def _target(checkpoint: str | os.PathLike, out: str) -> pathlib.Path:
    """Returns the folder to write. Raises UsageError if it is the checkpoint, inside it or around it."""
    target = outputs.resolve(out)
    source = pathlib.Path(os.path.realpath(weights.find(checkpoint)[0]))
    if target in (source, *source.parents) or source in target.parents:
        raise UsageError(f'--out {target} and the checkpoint {source} are one, or one is inside the other')
    return target


def _check_replaceable(out: pathlib.Path) -> None:
    """Raises UsageError if `out` exists and is not a folder, or has anything in it that no export has written."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f'--out {out} holds what is not an export of ours: it is a file')
    path, names = out / weights.EXPORT, set()
    if path.exists():
        with reading(path, UsageError, 'not readable'):
            listed = files.read_json(path, UsageError)['files']
            names = {name for name in listed if any(_matches(name, own) for own in OWN)}
    ours = names | {str(pathlib.PurePath(name).parent) for name in names}
    for path in sorted(out.rglob('*')):
        name = str(path.relative_to(out))
        if name not in ours or path.is_symlink() or path.is_dir() != (name not in names):
            raise UsageError(f'--out {out} holds what is not an export of ours: {name}')


def _matches(name: str, pattern: str) -> bool:
    return name.count('/') == pattern.count('/') and fnmatch.fnmatchcase(name, pattern)


def _about(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what the config.json of a Hugging Face folder has for other tools."""
    content = hf_config.read_json(folder / 'config.json')
    return {name: content[name] for name in hf_llama.ABOUT if name in content}


def _check(folder: pathlib.Path, loaded: Weights, dtype: str) -> str:
    """Returns a line for people, after a comparison of logits [2,64,V] and perplexity, or of the logits [2,C] of two
    images, with those of the written folder.

    Raises CheckpointError if they differ by more than BOUNDS.
    """
    rng, sizes = np.random.default_rng(0), loaded.model.config
    of_images = loaded.model.reads == 'images'
    ids = rng.integers(0, sizes.vocab_size, (2, 64), np.int32)
    images = rng.integers(0, 256, (2, sizes.image_size, sizes.image_size, 3), np.uint8) if of_images else None
    batch = {'images': images} if of_images else ids

    def numbers(model: Any, params: Any) -> tuple[np.ndarray, float]:
        logits, _ = jax.jit(model.apply)({'params': params}, batch)
        if model.obstacle:
            return np.asarray(logits), 0.0  # it predicts no tokens
        loss = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()
        return np.asarray(logits), float(np.exp(loss))

    logits, perplexity = numbers(loaded.model, loaded.params)
    written, reread = numbers(*hf.load(folder))
    largest, gap, bound = np.abs(logits).max(), np.abs(written - logits).max(), BOUNDS[dtype]
    if not (gap <= bound * largest and abs(reread - perplexity) <= bound * perplexity):  # also if one is NaN
        problem = (
            f'read back, its logits differ by {gap:.3g} of {largest:.3g}; {dtype} may differ by a share of {bound}'
        )
        raise CheckpointError(f'{loaded.where}: {problem}{"" if dtype == "float32" else ": use --dtype float32"}')
    rows = '2 random images' if of_images else f'{ids.size} random tokens'
    same = 'identical' if np.array_equal(written, logits) and reread == perplexity else f'equal up to {dtype}'
    words = '' if loaded.model.obstacle else f', of the perplexity {abs(reread - perplexity):.3g} (of {perplexity:.6g})'
    return (
        f'read back and compared: {same} (on {rows} the largest difference of a logit {gap:.3g} '
        f'(of {largest:.3g}){words})'
    )


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog='python -m mixln_jax.export', description=__doc__, allow_abbrev=False)
    parser.add_argument(
        '--checkpoint', required=True, metavar='DIR', help='a run, one of its checkpoints/<step>, a Hugging Face folder'
    )
    parser.add_argument('--out', required=True, metavar='DIR', help='folder to write; one of ours is replaced')
    parser.add_argument('--dtype', choices=tensors.DTYPES, default='float32', help='type of the weights [float32]')
    parser.add_argument(
        '--max_shard_gb', type=float, default=5.0, metavar='X', help='largest file, in 10^9 bytes [5.0]'
    )
    parser.add_argument(
        '--norm_position', metavar='NAMES', help='placement of a Hugging Face folder that does not say it'
    )
    parser.add_argument(
        '--remove_layers', metavar='N,...', help='leave these layers out, the first is 1: what analysis.drop measures'
    )
    parser.add_argument(
        '--format',
        choices=hf_vit.LAYOUTS,
        default=hf_vit.TRANSFORMERS,
        help="whose names a ViT's tensors have; timm: Pre-LN alone [transformers]",
    )
    parser.add_argument(
        '--adapter', action='store_true', help='write the adapters of a LoRA run alone, as peft reads them'
    )
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')

    def job() -> None:
        options = cli.parse(parser, argv)
        if options.adapter:
            for name in ('dtype', 'max_shard_gb', 'norm_position', 'remove_layers', 'format'):
                if getattr(options, name) != parser.get_default(name):
                    raise UsageError(f'--{name} has no meaning with --adapter')
        jax.config.update('jax_platforms', 'cpu')  # an export is not worth the wait for a device
        removed = [cli.parse_decimal(part) for part in cli.split_list(options.remove_layers or '')]
        if (options.remove_layers is not None and not removed) or None in removed:
            raise UsageError(f'--remove_layers {options.remove_layers!r}: numbers from 1 are needed, such as 3 or 3,4')
        if options.adapter:
            export_adapter(options.checkpoint, options.out)
            return
        export(
            options.checkpoint,
            options.out,
            options.dtype,
            options.max_shard_gb,
            options.norm_position,
            {number for number in removed if number is not None},
            options.format,
        )

    return cli.call(job, show_traceback='--traceback' in argv)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
