"""LLaMA with a norm placement per layer, for transformers: folders that mixln_jax has exported hold a copy.

config.json describes each layer under `placements`. A sub-layer F changes the residual stream x by one rule, in which
each of `residual_normed`, `pre`, `out` and `post` is the name of a norm or absent, and a scale is a number, a parameter
or, absent, 1:

    x = residual_normed(x)
    h = out(F(pre(x) * in_scale))
    y = post(residual_scale * x + ramp * branch_scale * h)
"""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaPreTrainedModel, LlamaRMSNorm

NORMS = ('residual_normed', 'pre', 'out', 'post')


class MixlnConfig(LlamaConfig):
    """LlamaConfig with the keys `norm_position`, `layer_index`, `depth`, `placements`, `embed_norm`, `norm_groups`,
    `ramp_steps`, `ramp_step`."""

    model_type = 'mixln'


class GroupedRMSNorm(LlamaRMSNorm):
    """LlamaRMSNorm whose mean square is taken over each of `groups` parts of the features."""

    def __init__(self, hidden_size, eps, groups):
        super().__init__(hidden_size, eps=eps)
        self.groups = groups

    def forward(self, hidden_states):
        parts = hidden_states.float().unflatten(-1, (self.groups, -1))
        parts = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * parts.flatten(-2).to(hidden_states.dtype)


class MixlnDecoderLayer(LlamaDecoderLayer):
    """Attention, then MLP, each put into the residual stream by its placement."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        del self.input_layernorm, self.post_attention_layernorm
        self.placement = config.placements[layer_idx]
        for sublayer in (self.placement['attention'], self.placement['mlp']):
            groups = config.norm_groups if 'grouped' in sublayer else 1
            for name in sorted({sublayer[switch] for switch in NORMS if switch in sublayer}):
                self.add_module(name, GroupedRMSNorm(config.hidden_size, config.rms_norm_eps, groups))
            for factor in sublayer.values():
                if isinstance(factor, dict):
                    self.register_parameter(factor['parameter'], nn.Parameter(torch.ones(factor['shape'])))
        if 'qkv_norm' in self.placement:  # of each head, before the rotation
            for name in 'qkv':
                norm = LlamaRMSNorm(config.head_dim, eps=config.rms_norm_eps)
                self.self_attn.add_module(f'{name}_norm', norm)
                getattr(self.self_attn, f'{name}_proj').register_forward_hook(
                    lambda _, __, y, norm=norm: norm(y.unflatten(-1, (-1, config.head_dim))).flatten(-2)
                )

    def forward(self, hidden_states, **kwargs):
        """Returns the residual stream [B,T,D] after the layer; the keywords are those of attention."""
        x = self.residual(hidden_states, lambda x: self.self_attn(hidden_states=x, **kwargs)[0], 'attention')
        return self.residual(x, self.mlp, 'mlp')

    def residual(self, x, sublayer, name):
        """Returns the residual stream after a sub-layer, by the rule above."""
        placement = self.placement[name]

        def norm(switch, x):
            return getattr(self, placement[switch])(x) if switch in placement else x

        def scale(key):
            factor = placement.get(key, 1.0)
            return getattr(self, factor['parameter']) if isinstance(factor, dict) else factor

        x = norm('residual_normed', x)
        h = norm('out', sublayer(norm('pre', x) * scale('in_scale')))
        return norm('post', x * scale('residual_scale') + h * scale('branch_scale') * scale('ramp'))


class MixlnModel(LlamaModel):
    """LlamaModel with these layers."""

    config_class = MixlnConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList([MixlnDecoderLayer(config, number) for number in range(config.num_hidden_layers)])
        if getattr(config, 'embed_norm', False):
            self.embed_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.embed_tokens.register_forward_hook(lambda _, __, x: self.embed_norm(x))
        self.post_init()


class MixlnForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM with these layers."""

    config_class = MixlnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = MixlnModel(config)
        self.post_init()


class MixlnForSequenceClassification(LlamaForSequenceClassification):
    """LlamaForSequenceClassification with these layers."""

    config_class = MixlnConfig

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)  # theirs asks AutoModel, which does not know these layers
        self.num_labels = config.num_labels
        self.model = MixlnModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()
