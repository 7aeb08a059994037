"""LLaMA with a norm placement per layer, for transformers: a copy lies beside weights that mixln_jax has exported.

config.json says under `placements` what each layer does. A sub-layer F changes the residual stream x by one rule, where
each of `residual_normed`, `pre`, `out` and `post` is the name of a norm or absent, and a scale that is absent is 1:

    x = residual_normed(x)
    h = out(F(pre(x) * in_scale))
    y = post(residual_scale * x + branch_scale * h)
"""

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm


class MixlnConfig(LlamaConfig):
    """LlamaConfig with the keys `norm_position`, `layer_index`, `depth` and `placements`."""

    model_type = 'mixln'


class MixlnDecoderLayer(LlamaDecoderLayer):
    """Attention, then MLP, each put into the residual stream by its placement."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        del self.input_layernorm, self.post_attention_layernorm
        self.placement = config.placements[layer_idx]
        for at in self.placement.values():
            for name in sorted({name for name in at.values() if isinstance(name, str)}):
                self.add_module(name, LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps))

    def forward(self, hidden_states, **kwargs):
        """[B,T,D] -> [B,T,D]; the keywords are those of attention."""
        x = self.residual(hidden_states, lambda x: self.self_attn(hidden_states=x, **kwargs)[0], 'attention')
        return self.residual(x, self.mlp, 'mlp')

    def residual(self, x, sublayer, name):
        """The rule above."""
        at = self.placement[name]

        def norm(switch, x):
            return getattr(self, at[switch])(x) if switch in at else x

        x = norm('residual_normed', x)
        h = norm('out', sublayer(norm('pre', x) * at.get('in_scale', 1.0)))
        return norm('post', x * at.get('residual_scale', 1.0) + h * at.get('branch_scale', 1.0))


class MixlnModel(LlamaModel):
    """LlamaModel with these layers."""

    config_class = MixlnConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList([MixlnDecoderLayer(config, number) for number in range(config.num_hidden_layers)])
        self.post_init()


class MixlnForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM with these layers."""

    config_class = MixlnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = MixlnModel(config)
        self.post_init()
