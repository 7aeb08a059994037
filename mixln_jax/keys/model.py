"""Keys of the network."""

import dataclasses

from mixln_jax.keys.field import LARGEST_VOCABULARY, LONGEST, key

LLAMA, BERT, VIT = ('llama',), ('bert',), ('vit',)


@dataclasses.dataclass(frozen=True)
class Model:
    """The network. Names such as `hidden_size` are those of Hugging Face's LLaMA."""

    family: str = key('llama', 'architecture', choices=('llama', 'bert', 'vit'), weights=True)
    vocab_size: int = key(
        32000,
        'size of the vocabulary',
        at_least=2,
        at_most=LARGEST_VOCABULARY,
        weights=True,
        families=LLAMA + BERT,
    )
    hidden_size: int = key(768, 'width D of the residual stream', at_least=1, at_most=2**18, weights=True)
    intermediate_size: int = key(2048, 'width of the MLP', at_least=1, at_most=2**20, weights=True)
    num_layers: int = key(12, 'number of layers L', at_least=1, at_most=10_000, weights=True)
    num_heads: int = key(12, 'number of query heads', at_least=1, weights=True)
    num_kv_heads: int = key(0, 'number of key and value heads; 0: as many as query heads', at_least=0, families=LLAMA)
    head_dim: int = key(0, 'features per head; 0: hidden_size / num_heads', at_least=0, at_most=2**16, families=LLAMA)
    attention_bias: bool = key(False, 'biases in the matrices of attention', weights=True, families=LLAMA)
    mlp_bias: bool = key(False, 'biases in the matrices of the MLP', weights=True, families=LLAMA)
    tie_word_embeddings: bool = key(False, 'use the transposed embedding as the head', weights=True, families=LLAMA)
    norm_position: str = key(
        'mix',
        'placement of the norms: a name for all layers, mix, or a list such as post*3,pre*9; +prores after a name, as '
        'in mix+prores, ramps up its sub-layers',
    )
    post_ratio: float = key(0.25, 'share of Post-LN layers under mix', at_least=0.0, at_most=1.0)
    ramp_steps: int = key(
        1000,
        '+prores: number of updates T after which layer 1 is ramped up; layer l is after T * l',
        at_least=1,
        at_most=100_000,
    )
    ramp_offset: int = key(
        'auto',
        '+prores: number of updates that the ramp has made before the first step; auto: those of the weights of '
        'init_from, else 0; a run that continues keeps its own',
        at_least=0,
        at_most=2**30,
    )
    norm_groups: int = key(4, 'groups of features in the norms of group_pre', at_least=1)
    norm_eps: float = key(1e-6, 'epsilon of the norms', above=0.0, weights=True)
    rope_theta: float = key(10000.0, 'base of the rotary angles', above=1.0, weights=True, families=LLAMA)
    rope_type: str = key(
        'default',
        'llama3: slow rotations are slowed further, as in Llama 3.1',
        choices=('default', 'llama3'),
        weights=True,
        families=LLAMA,
    )
    rope_factor: float = key(
        8.0, 'llama3: factor by which the slowest rotations are slowed', at_least=1.0, families=LLAMA
    )
    rope_low_freq_factor: float = key(
        1.0,
        'llama3: rotations with fewer turns than this in rope_original_length tokens are the slowest',
        above=0.0,
        families=LLAMA,
    )
    rope_high_freq_factor: float = key(
        4.0,
        'llama3: rotations with more turns than this in rope_original_length tokens stay as they are',
        above=0.0,
        families=LLAMA,
    )
    rope_original_length: int = key(
        8192, 'llama3: number of tokens over which turns are counted', at_least=1, families=LLAMA
    )
    num_positions: int = key(
        512, 'bert: rows of the table of positions', at_least=2, at_most=LONGEST, weights=True, families=BERT
    )
    num_types: int = key(2, 'bert: number of token types', at_least=1, at_most=2**16, weights=True, families=BERT)
    gelu: str = key(
        'erf',
        'bert, vit: the exact GELU, or its approximation by tanh',
        choices=('erf', 'tanh'),
        weights=True,
        families=BERT + VIT,
    )
    image_size: int = key(224, 'vit: pixels of the sides', at_least=1, at_most=4096, weights=True, families=VIT)
    patch_size: int = key(
        16, 'vit: pixels of the sides of a patch', at_least=1, at_most=4096, weights=True, families=VIT
    )
    num_classes: int = key(1000, 'vit: number of classes', at_least=2, at_most=2**20, weights=True, families=VIT)
    positions: str = key(
        'sincos2d',
        'vit: what is added to the patches; sincos2d: sines and cosines of row and column, learned: a table',
        choices=('sincos2d', 'learned'),
        weights=True,
        families=VIT,
    )
    pool: str = key(
        'gap',
        'vit: what the head reads; gap: the mean over all patches, tok: one more token, which is learned',
        choices=('gap', 'tok'),
        weights=True,
        families=VIT,
    )
    representation: bool = key(False, 'vit: a layer with tanh before the head', weights=True, families=VIT)
    pixels: str = key(
        'half',
        'vit: mean and standard deviation by which pixels from 0 to 1 are normalised; half: 0.5 and 0.5, imagenet: '
        "ImageNet's, for each colour",
        choices=('half', 'imagenet'),
        weights=True,
        families=VIT,
    )
    init: str = key(
        'auto',
        'initialisation: normal (init_std), scaled (attention and MLP outputs divided by sqrt(2L)), deepnorm, '
        'xavier (Glorot and Bengio 2010, uniform), or auto (deepnorm in deepnorm layers, else normal)',
        choices=('auto', 'normal', 'scaled', 'deepnorm', 'xavier'),
    )
    init_std: float = key(0.02, 'standard deviation of the weights', above=0.0)
    scale_embed: bool = key(False, 'multiply embeddings by sqrt(D)', weights=True, families=LLAMA)
    embed_std: float = key(0.02, 'standard deviation of the embedding', above=0.0)
    remat: str = key(
        'none',
        'what the backward pass recomputes: nothing, all but the matrix products (dots), or the whole layer (full)',
        choices=('none', 'dots', 'full'),
        may_change=True,
    )
    scan_unroll: str = key(
        'auto',
        'layers unrolled in the compiled loop; all: slightly faster, but longer to compile, and remat has no effect; '
        'auto: all for up to 12 layers without remat, else 1',
        choices=('auto', '1', 'all'),
        may_change=True,
    )
    attention: str = key(
        'auto',
        "blocks: in blocks of queries; auto: cuDNN's kernel where possible (NVIDIA GPUs from Ampere on, bfloat16)",
        choices=('auto', 'blocks'),
        may_change=True,
        families=LLAMA,
    )

    @property
    def head_size(self) -> int:
        """Returns the features per head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def ramp_start(self) -> int:
        """Number of updates that the ramps have made before the first step."""
        return 0 if self.ramp_offset == 'auto' else self.ramp_offset

    @property
    def kv_heads(self) -> int:
        """Returns the number of key and value heads."""
        return self.num_kv_heads or self.num_heads
