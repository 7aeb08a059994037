"""Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929): patches, the shared stack, a head over classes.

B images of S x S pixels, P the side of a patch, T positions: (S/P)^2 patches, row by row, after one learned token where
`pool` is `tok`. C classes.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax import config as configs
from mixln_jax.models import layers, placements, transformer
from mixln_jax.models.encoder import PARTS
from mixln_jax.models.layers import LayerNorm
from mixln_jax.models.network import Network
from mixln_jax.system.errors import UsageError

TOKEN, GAP = 'tok', 'gap'  # values of `pool`
PIXELS = {  # mean and standard deviation of red, green and blue, of pixels from 0 to 1
    'half': ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    'imagenet': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class ViT(Network):
    """Vision Transformer; see Network. `pre` is the placement of all published weights.

    With `pool=gap`, sines and cosines as positions and `representation`, it is that of Beyer et al. 2022, Better plain
    ViT baselines for ImageNet-1k (arXiv 2205.01580); with `pool=tok` and learned positions the original one.
    """

    reads: ClassVar[str] = 'images'
    causal: ClassVar[bool] = False
    lookups: ClassVar[tuple[str, ...]] = ('positions/embedding', 'token/embedding')
    undecayed: ClassVar[tuple[str, ...]] = lookups  # as in timm; big_vision decays kernels alone

    @classmethod
    def check(cls, config: configs.Model) -> None:
        """Raises UsageError if patches do not fill the image, or features do not come in the fours of sincos2d."""
        if config.image_size % config.patch_size:
            raise UsageError(
                f'config.model.image_size={config.image_size} is not divisible by '
                f'config.model.patch_size={config.patch_size}'
            )
        if config.positions == 'sincos2d' and config.hidden_size % 4:
            raise UsageError(
                f'config.model.hidden_size={config.hidden_size} must be a multiple of 4 for '
                'config.model.positions=sincos2d'
            )

    @property
    def grid(self) -> int:
        """Number of patches along a side."""
        return self.config.image_size // self.config.patch_size

    @property
    def head_columns(self) -> int:
        """Number of classes."""
        return self.config.num_classes

    def row_length(self, seq_length: int) -> int:
        """Returns T."""
        del seq_length
        return self.grid**2 + (self.config.pool == TOKEN)

    @property
    def initial_stds(self) -> dict[str, float]:
        """Standard deviations of the leaves that are not drawn as the others; the head begins at 0."""
        patch = 3 * self.config.patch_size**2
        return {
            'patch/kernel': patch**-0.5,
            'token/embedding': 0.0,
            'representation/kernel': self.config.hidden_size**-0.5,
            'classes/kernel': 0.0,
        }

    def setup(self) -> None:
        config, dtype = self.config, jnp.dtype(self.compute_dtype)
        table = lambda rows: layers.Embedding(rows, config.hidden_size, dtype, self.stream_sharding)  # noqa: E731
        self.patch = layers.linear(config.hidden_size, dtype, None, bias=True)
        if config.positions == 'learned':
            self.positions = table(self.row_length(0))
        if config.pool == TOKEN:
            self.token = table(1)
        if placements.PLACEMENTS[self.norm_position[0]].embed_norm:
            self.embed_norm = LayerNorm(config.norm_eps, dtype)
        self.layers = transformer.Stack(
            config, dtype, self.norm_position, self.layer_index, self.depth, self.stream_sharding, PARTS
        )
        self.norm = LayerNorm(config.norm_eps, dtype)
        if config.representation:
            self.representation = layers.linear(config.hidden_size, dtype, None, bias=True)
        self.classes = layers.linear(config.num_classes, jnp.float32, None, bias=True)

    def backbone(
        self,
        batch: Mapping[str, jax.Array],
        layer_mask: jax.Array | None = None,
        capture: bool = False,
        step: int | jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        """Returns the hidden states x [B,T,D] after the final norm, and a dict as in Llama.

        Args:
            batch: `images` [B,S,S,3], red, green and blue from 0 to 255, integers or not. Other arrays are ignored.
            layer_mask, capture, step: as in Llama.

        Raises UsageError: images of another size.
        """
        images, size = batch['images'], self.config.image_size
        if images.shape[1:] != (size, size, 3):
            shape = ' x '.join(map(str, images.shape[1:]))
            raise UsageError(f'images of {shape}, but the network is for {size} x {size} x 3 (config.model.image_size)')
        with jax.default_matmul_precision(self.precision):
            first = self.patch(patches(normalized(images, self.config.pixels), self.config.patch_size))
            token = self.token(jnp.zeros((len(images), 1), jnp.int32)) if self.config.pool == TOKEN else None
            if self.config.positions == 'learned':
                with_token = first if token is None else jnp.concatenate([token, first], axis=1)
                first = with_token + self.positions(jnp.arange(with_token.shape[1]))
            else:
                first += sincos2d(self.grid, self.config.hidden_size).astype(first.dtype)
                first = first if token is None else jnp.concatenate([token, first], axis=1)
            if placements.PLACEMENTS[self.norm_position[0]].embed_norm:
                first = self.embed_norm(first)
            last, out = self.run_layers(first, None, None, layer_mask, capture, step)
            return self.norm(last), out

    def __call__(
        self,
        batch: Mapping[str, jax.Array],
        layer_mask: jax.Array | None = None,
        capture: bool = False,
        step: int | jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        """Returns logits [B,C] in float32 and the dict of `backbone`."""
        x, out = self.backbone(batch, layer_mask, capture, step)
        with jax.default_matmul_precision(self.precision):
            pooled = x[:, 0] if self.config.pool == TOKEN else x.astype(jnp.float32).mean(axis=1)
            if self.config.representation:
                pooled = jnp.tanh(self.representation(pooled))
            return self.classes(pooled), out

    @nn.nowrap
    def flops_per_position(self, params: Any, seq_length: int) -> int:
        """Returns the FLOPs of training on one position, by formula; the head multiplies once for each image."""
        positions = self.row_length(seq_length)
        once = self.num_params([params.get(name, {}) for name in ('representation', 'classes')])
        body = super().flops_per_position(params, positions) - 6 * once
        return body + 6 * once // positions

    @nn.nowrap
    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns a batch of one image."""
        size = self.config.image_size
        return {'images': jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)}


def normalized(images: jax.Array, pixels: str) -> jax.Array:
    """Returns images [B,S,S,3] of 0 to 255 in float32, with the mean and deviation of PIXELS taken out."""
    mean, deviation = np.array(PIXELS[pixels], np.float32)
    return (images.astype(jnp.float32) / 255 - mean) / deviation


def patches(images: jax.Array, size: int) -> jax.Array:
    """Returns the patches [B,T,P*P*3] of images [B,S,S,3], row by row; a patch's pixels too, each with its colours."""
    B, S, _, C = images.shape
    n = S // size
    return images.reshape(B, n, size, n, size, C).swapaxes(2, 3).reshape(B, n * n, size * size * C)


def resized_positions(table: np.ndarray, before: int, after: int) -> np.ndarray:
    """Returns learned positions [T,D] of before x before patches as those of after x after ones.

    Bicubic with antialiasing, as timm's resample_abs_pos_embed; the row of a token, the first one, stays as it is.
    """
    rows = len(table) - before**2
    grid = jnp.asarray(table[rows:], jnp.float32).reshape(before, before, -1)
    resized = jax.image.resize(grid, (after, after, grid.shape[-1]), 'cubic', precision='highest')
    return np.concatenate([table[:rows], np.asarray(resized).reshape(after**2, -1)])


def sincos2d(grid: int, width: int) -> np.ndarray:
    """Returns the positions [grid^2, width] of patches, row by row, in float32: sines and cosines of the column, then
    of the row, at width/4 frequencies from 1 to 1/10,000 (Chen et al. 2021, MoCo v3, arXiv 2104.02057)."""
    row, column = (at.reshape(-1, 1) for at in np.mgrid[:grid, :grid])
    frequencies = 10_000.0 ** -np.linspace(0, 1, width // 4)
    angles = column * frequencies, row * frequencies
    return np.concatenate([turn(at) for at in angles for turn in (np.sin, np.cos)], axis=1).astype(np.float32)
