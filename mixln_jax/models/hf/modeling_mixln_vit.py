"""ViT with a norm placement per layer, for transformers: folders that mixln_jax has exported hold a copy.

config.json describes each layer under `placements`, by the rule in modeling_mixln.py, and with `positions`
(learned or sincos2d), `pool` (tok or gap) and `representation` what is around the layers.
"""

import torch
from torch import nn
from transformers import PreTrainedModel, ViTConfig
from transformers.activations import ACT2FN
from transformers.modeling_outputs import ImageClassifierOutput

from .modeling_mixln import NORMS, MixlnDecoderLayer


class MixlnViTConfig(ViTConfig):
    """ViTConfig with the keys `norm_position`, `layer_index`, `depth`, `placements`, `embed_norm`, `norm_groups`,
    `ramp_steps`, `ramp_step`, `positions`, `pool`, `representation`."""

    model_type = 'mixln_vit'


class GroupedLayerNorm(nn.LayerNorm):
    """LayerNorm whose mean and variance are taken over each of `groups` parts of the features."""

    def __init__(self, features, eps, groups):
        super().__init__(features, eps=eps)
        self.groups = groups

    def forward(self, x):
        parts = nn.functional.layer_norm(x.unflatten(-1, (self.groups, -1)), [x.shape[-1] // self.groups], eps=self.eps)
        return self.weight * parts.flatten(-2) + self.bias


class MixlnViTLayer(nn.Module):
    """Attention, then MLP, each put into the residual stream by its placement."""

    residual = MixlnDecoderLayer.residual

    def __init__(self, config, number):
        super().__init__()
        self.placement, self.heads = config.placements[number], config.num_attention_heads
        width, eps = config.hidden_size, config.layer_norm_eps
        for sublayer in (self.placement['attention'], self.placement['mlp']):
            groups = config.norm_groups if 'grouped' in sublayer else 1
            for name in sorted({sublayer[switch] for switch in NORMS if switch in sublayer}):
                self.add_module(name, GroupedLayerNorm(width, eps, groups))
            for factor in sublayer.values():
                if isinstance(factor, dict):
                    self.register_parameter(factor['parameter'], nn.Parameter(torch.ones(factor['shape'])))
        maps = {name: nn.Linear(width, width) for name in ('query', 'key', 'value')}
        if 'qkv_norm' in self.placement:
            maps |= {f'{name}_norm': nn.LayerNorm(width // self.heads, eps=eps) for name in maps}
        self.attention = nn.ModuleDict(
            {'attention': nn.ModuleDict(maps), 'output': nn.ModuleDict({'dense': nn.Linear(width, width)})}
        )
        self.intermediate = nn.ModuleDict({'dense': nn.Linear(width, config.intermediate_size)})
        self.output = nn.ModuleDict({'dense': nn.Linear(config.intermediate_size, width)})
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x):
        """Returns the residual stream [B,T,D] after the layer."""
        return self.residual(self.residual(x, self.attend, 'attention'), self.feed, 'mlp')

    def attend(self, x):
        """Returns what attention makes of x [B,T,D]."""
        maps = self.attention['attention']

        def heads(name):
            y = maps[name](x).unflatten(-1, (self.heads, -1))
            return (maps[f'{name}_norm'](y) if f'{name}_norm' in maps else y).transpose(1, 2)

        y = nn.functional.scaled_dot_product_attention(heads('query'), heads('key'), heads('value'))
        return self.attention['output']['dense'](y.transpose(1, 2).flatten(-2))

    def feed(self, x):
        """Returns what the MLP makes of x [B,T,D]."""
        return self.output['dense'](self.activation(self.intermediate['dense'](x)))


class MixlnViTEmbeddings(nn.Module):
    """Patches, row by row, with positions, after a learned token where the head reads it."""

    def __init__(self, config):
        super().__init__()
        self.grid, width = config.image_size // config.patch_size, config.hidden_size
        self.patch_embeddings = nn.ModuleDict(
            {'projection': nn.Conv2d(3, width, kernel_size=config.patch_size, stride=config.patch_size)}
        )
        token = config.pool == 'tok'
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if token else None
        learned = config.positions == 'learned'
        self.position_embeddings = nn.Parameter(torch.zeros(1, self.grid**2 + token, width)) if learned else None
        if getattr(config, 'embed_norm', False):
            self.embed_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixel_values):
        """Returns the stream [B,T,D] before the first layer."""
        x = self.patch_embeddings['projection'](pixel_values).flatten(2).transpose(1, 2)
        if self.position_embeddings is None:
            x = x + sincos2d(self.grid, x.shape[-1]).to(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        if self.position_embeddings is not None:
            x = x + self.position_embeddings
        return self.embed_norm(x) if hasattr(self, 'embed_norm') else x


def sincos2d(grid, width):
    """Returns the positions [grid^2, width]: sines and cosines of the column, then of the row (MoCo v3)."""
    row, column = torch.meshgrid(*[torch.arange(grid, dtype=torch.float64)] * 2, indexing='ij')
    frequencies = 10_000.0 ** -torch.linspace(0, 1, width // 4, dtype=torch.float64)
    angles = [place.reshape(-1, 1) * frequencies for place in (column, row)]
    return torch.cat([turn(angle) for angle in angles for turn in (torch.sin, torch.cos)], dim=1)


class MixlnViTForImageClassification(PreTrainedModel):
    """ViTForImageClassification with these layers."""

    config_class = MixlnViTConfig
    base_model_prefix = 'vit'
    main_input_name = 'pixel_values'

    def __init__(self, config):
        super().__init__(config)
        layers = [MixlnViTLayer(config, number) for number in range(config.num_hidden_layers)]
        self.vit = nn.ModuleDict(
            {
                'embeddings': MixlnViTEmbeddings(config),
                'encoder': nn.ModuleDict({'layer': nn.ModuleList(layers)}),
                'layernorm': nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
            }
        )
        if config.representation:
            self.vit['representation'] = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, pixel_values, labels=None, **_):
        """Returns the logits [B,C] of pixels [B,3,S,S], and the cross-entropy with labels [B] where they are given."""
        x = self.vit['embeddings'](pixel_values.to(self.classifier.weight.dtype))
        for layer in self.vit['encoder']['layer']:
            x = layer(x)
        x = self.vit['layernorm'](x)
        x = x[:, 0] if self.config.pool == 'tok' else x.mean(dim=1)
        logits = self.classifier(torch.tanh(self.vit['representation'](x)) if self.config.representation else x)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
