"""The judge: a LLaMA-type transformer with every normalisation placement, float64 numpy, nothing shared with mixln_jax.

Each placement is its own straight-line code. Every operation in `forward` and `loss` is analytic and takes complex128,
so `gradients` is exact to rounding (complex step). Letters: V vocabulary, D width, H query heads, K key/value heads, hd
head width, F MLP width, L layers, B batch, T length; `...` are optional leading axes of perturbations.
"""

from functools import partial

import numpy as np

# --- Placements: x [..., B, T, D] -> y [..., B, T, D]. w: the layer's weights; attention, mlp: functions of the
# sub-layer's input; norm(x, gain): RMSNorm; l = 1..L: the layer's index; L: the depth; r: what each sub-layer's output
# is multiplied by, see `prores`.


def prores(l, T, t):
    """min(t / (T l), 1) after t updates; the factor of what a sub-layer adds. Chen et al., arXiv 2603.05369: Pre-LN
    x + a F(N(x)); Post-LN N(x + a F(x)); Sandwich-LN x + a N(F(N(x))); DeepNorm N(alpha x + a F(x)); LNS
    x + a F(N(x) / sqrt(l)).
    """
    return min(t / (T * l), 1.0)


def pre(x, w, attention, mlp, norm, l, L, r=1.0):
    """Pre-LN: y = x + F(N_in(x)). Xiong et al., arXiv 2002.04745; LLaMA."""
    a = x + r * attention(norm(x, w['attention_in']))
    return a + r * mlp(norm(a, w['mlp_in']))


def post(x, w, attention, mlp, norm, l, L, r=1.0):
    """Post-LN: y = N_post(x + F(x)). Vaswani et al., arXiv 1706.03762."""
    a = norm(x + r * attention(x), w['attention_post'])
    return norm(a + r * mlp(a), w['mlp_post'])


def sandwich(x, w, attention, mlp, norm, l, L, r=1.0):
    """Sandwich-LN: y = x + N_out(F(N_in(x))). CogView, arXiv 2105.13290."""
    a = x + r * norm(attention(norm(x, w['attention_in'])), w['attention_out'])
    return a + r * norm(mlp(norm(a, w['mlp_in'])), w['mlp_out'])


def res_post(x, w, attention, mlp, norm, l, L, r=1.0):
    """Res-post-norm: y = x + N_out(F(x)). Swin v2, arXiv 2111.09883; OLMo 2, arXiv 2501.00656."""
    a = x + r * norm(attention(x), w['attention_out'])
    return a + r * norm(mlp(a), w['mlp_out'])


def deepnorm(x, w, attention, mlp, norm, l, L, r=1.0):
    """DeepNorm, decoder only: y = N_post((2L)^(1/4) x + F(x)). Wang et al., arXiv 2203.00555."""
    alpha = (2.0 * L) ** 0.25
    a = norm(alpha * x + r * attention(x), w['attention_post'])
    return norm(alpha * a + r * mlp(a), w['mlp_post'])


def lns(x, w, attention, mlp, norm, l, L, r=1.0):
    """LayerNorm scaling: y = x + F(N_in(x) / sqrt(l)). Sun et al., arXiv 2502.05795."""
    a = x + r * attention(norm(x, w['attention_in']) / np.sqrt(float(l)))
    return a + r * mlp(norm(a, w['mlp_in']) / np.sqrt(float(l)))


def lns_branch(x, w, attention, mlp, norm, l, L, r=1.0):
    """LayerNorm scaling after the sub-layer: y = x + F(N_in(x)) / sqrt(l). The same, section on vision."""
    a = x + r * attention(norm(x, w['attention_in'])) / np.sqrt(float(l))
    return a + r * mlp(norm(a, w['mlp_in'])) / np.sqrt(float(l))


def peri(x, w, attention, mlp, norm, l, L, r=1.0):
    """Peri-LN: as Sandwich-LN, and the embedding's output is normalised. Kim et al., arXiv 2502.02732."""
    return sandwich(x, w, attention, mlp, norm, l, L, r)


def hybridnorm(x, w, attention, mlp, norm, l, L, r=1.0):
    """HybridNorm: a = x + MHA_QKV(x); y = N(a) + F(N(a)). Zhuo et al., arXiv 2503.04598, eq. 10 and 11."""
    a = x + r * attention(x)
    b = norm(a, w['mlp_in'])
    return b + r * mlp(b)


def hybridnorm_first(x, w, attention, mlp, norm, l, L, r=1.0):
    """Layer 1 of HybridNorm*: a = x + MHA_QKV(N(x)); y = a + F(N(a)). The same, section 3.2."""
    return pre(x, w, attention, mlp, norm, l, L, r)


def scale_res_pre(x, w, attention, mlp, norm, l, L, r=1.0):
    """y = x + s F(N_in(x)), s a learned scalar. The Mix-LN authors' code, NORM_TYPE=scale_res_pre_norm."""
    a = x + r * w['attention_branch'] * attention(norm(x, w['attention_in']))
    return a + r * w['mlp_branch'] * mlp(norm(a, w['mlp_in']))


def admin(x, w, attention, mlp, norm, l, L, r=1.0):
    """Admin: y = N_post(omega x + F(x)), omega a learned vector. Liu et al., arXiv 2004.08249."""
    a = norm(w['attention_residual'] * x + r * attention(x), w['attention_post'])
    return norm(w['mlp_residual'] * a + r * mlp(a), w['mlp_post'])


def admin_constant(x, w, attention, mlp, norm, l, L, r=1.0):
    """Admin with omega = sqrt((n + 1) / ln(n + 1) - 1) for n = 2L sub-layers. PyPI's admin-torch."""
    omega = np.sqrt((2 * L + 1) / np.log(2 * L + 1) - 1)
    a = norm(omega * x + r * attention(x), w['attention_post'])
    return norm(omega * a + r * mlp(a), w['mlp_post'])


def group_pre(x, w, attention, mlp, norm, l, L, r=1.0):
    """Pre-LN, the mean square taken over each of 4 groups of features. Wu and He, arXiv 1803.08494; Mix-LN, Table 6."""
    return pre(x, w, attention, mlp, partial(norm, groups=4), l, L, r)


def deepnorm_official(x, w, attention, mlp, norm, l, L, r=1.0):
    """DeepNorm with the constant of 32 layers at any depth. The Mix-LN authors' code, NORM_TYPE=deeppost."""
    return deepnorm(x, w, attention, mlp, norm, l, 32, r)


PLACEMENTS = {
    f.__name__: f
    for f in (
        *(pre, post, sandwich, res_post, deepnorm, lns, lns_branch, peri, hybridnorm, hybridnorm_first),
        *(scale_res_pre, admin, admin_constant, group_pre, deepnorm_official),
    )
}
# The vectors of a layer beside its matrices: name -> length (D: width; hd: of a head; 0: a scalar).
IN, OUT, POST = ({f'{sublayer}_{at}': 'D' for sublayer in ('attention', 'mlp')} for at in ('in', 'out', 'post'))
QKV = dict(q_norm='hd', k_norm='hd', v_norm='hd')
VECTORS = dict(pre=IN, post=POST, sandwich=IN | OUT, res_post=OUT, deepnorm=POST, lns=IN, lns_branch=IN, peri=IN | OUT)
VECTORS |= dict(hybridnorm=QKV | {'mlp_in': 'D'}, hybridnorm_first=QKV | IN, admin_constant=POST, group_pre=IN)
VECTORS |= dict(scale_res_pre=IN | {'attention_branch': '0', 'mlp_branch': '0'}, deepnorm_official=POST)
VECTORS |= dict(admin=POST | {'attention_residual': 'D', 'mlp_residual': 'D'})

# --- Parts


def rms_norm(x, gain, eps, groups=1):
    """x [..., D], gain [D] -> [..., D]: x / sqrt(mean(x^2) + eps) * gain. Zhang and Sennrich, arXiv 1910.07467."""
    parts = np.split(x, groups, axis=-1)
    return np.concatenate([p / np.sqrt(np.mean(p * p, axis=-1, keepdims=True) + eps) for p in parts], -1) * gain


def llama3(frequencies, factor, low, high, length):
    """apply_scaling of Meta's Llama 3.1 (models/llama3/reference_impl/model.py), one frequency after the other."""
    scaled = []
    for frequency in frequencies:
        wavelength = 2 * np.pi / frequency
        if wavelength < length / high:
            scaled.append(frequency)
        elif wavelength > length / low:
            scaled.append(frequency / factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(scaled)


def rotary(x, theta, positions, scaling=None):
    """x [..., T, heads, hd], positions [..., T] -> x cos + rotate_half(x) sin. Su et al., arXiv 2104.09864; HF.

    scaling: arguments of `llama3` after the first.
    """
    width = x.shape[-1]
    frequencies = theta ** (-2.0 * np.arange(width // 2) / width)
    angles = positions[..., None] * (llama3(frequencies, *scaling) if scaling else frequencies)
    angles = np.concatenate([angles, angles], axis=-1)[..., None, :]
    rotated = np.concatenate([-x[..., width // 2 :], x[..., : width // 2]], axis=-1)
    return x * np.cos(angles) + rotated * np.sin(angles)


def causal_attention(x, w, heads, kv_heads, theta, positions, segments, eps, scaling=None):
    """x [..., B, T, D] -> same; query head h reads kv head h // (H/K). Ainslie et al., arXiv 2305.13245.

    A token reads those of its own segment up to itself. With gains q_norm, k_norm, v_norm [hd] each head's queries,
    keys and values are normalised before the rotation. q_bias, k_bias, v_bias, o_bias are added to the products.
    """
    q, k, v = (x @ w[name] + w.get(f'{name}_bias', 0.0) for name in 'qkv')
    q = q.reshape(*q.shape[:-1], heads, -1)
    k, v = (a.reshape(*a.shape[:-1], kv_heads, -1) for a in (k, v))
    if 'q_norm' in w:
        q, k, v = (rms_norm(a, w[name][..., None, :], eps) for a, name in ((q, 'q_norm'), (k, 'k_norm'), (v, 'v_norm')))
    q, k = rotary(q, theta, positions, scaling), rotary(k, theta, positions, scaling)
    reads = np.arange(heads) // (heads // kv_heads)
    q, k, v = (np.swapaxes(a, -3, -2) for a in (q, k[..., reads, :], v[..., reads, :]))  # [..., B, H, T, hd]
    scores = q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1])
    same = segments[:, None, :, None] == segments[:, None, None, :]
    scores = np.where(same & np.tri(x.shape[-2], dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.real.max(axis=-1, keepdims=True))
    p = p / p.sum(axis=-1, keepdims=True)
    h = np.swapaxes(p @ v, -3, -2)
    return h.reshape(*h.shape[:-2], -1) @ w['o'] + w.get('o_bias', 0.0)


def swiglu(x, w):
    """x [..., D] -> [..., D]: (silu(x gate) * (x up)) down, with biases where w has them. Shazeer, arXiv 2002.05202."""
    g, u = (x @ w[name] + w.get(f'{name}_bias', 0.0) for name in ('gate', 'up'))
    return (g / (1.0 + np.exp(-g)) * u) @ w['down'] + w.get('down_bias', 0.0)


# --- The network, its loss and its gradients


def _map(f, weights):
    """The same structure with f(leaf) at every leaf; weights: dicts and lists of arrays."""
    if isinstance(weights, dict):
        return {name: _map(f, sub) for name, sub in weights.items()}
    return [_map(f, sub) for sub in weights] if isinstance(weights, list) else f(weights)


def _double(a):
    """Any array -> float64, or complex128 where it is complex."""
    return np.asarray(a, np.complex128 if np.iscomplexobj(a) else np.float64)


def forward(
    weights,
    ids,
    placements,
    *,
    heads,
    kv_heads,
    eps=1e-6,
    theta=10000.0,
    layer_index=None,
    depth=None,
    keep=None,
    positions=None,
    segments=None,
    scaling=None,
    ramp=None,
):
    """ids [B, T] -> (L+1 arrays [..., B, T, D]: the raw residual stream, logits [..., B, T, V]). arXiv 2302.13971.

    layer_index (L numbers from 1) and depth replace l and L; where keep[0..L-1] is False the layer is the identity.
    positions [B, T] replace 0..T-1; tokens of unequal segments [B, T] do not read each other. scaling: see `rotary`.
    ramp: (T, t) of `prores`, for layers whose name ends in +prores. Without weights['head'] the head is the embedding,
    transposed (Press and Wolf, arXiv 1608.05859).
    """
    weights, count = _map(_double, weights), len(weights['layers'])
    assert len(placements) == count, (placements, count)
    layer_index = range(1, count + 1) if layer_index is None else layer_index
    depth = count if depth is None else depth
    norm = partial(rms_norm, eps=eps)
    attention = partial(
        causal_attention,
        heads=heads,
        kv_heads=kv_heads,
        theta=theta,
        positions=np.arange(np.shape(ids)[1]) if positions is None else positions,
        segments=np.zeros(np.shape(ids)) if segments is None else segments,
        eps=eps,
        scaling=scaling,
    )
    x = weights['embed'][..., np.asarray(ids), :]
    if 'embed_norm' in weights:
        x = norm(x, weights['embed_norm'])
    hidden = [x]
    for i, (name, w) in enumerate(zip(placements, weights['layers'], strict=True)):
        if keep is None or keep[i]:
            parts = partial(attention, w=w), partial(swiglu, w=w)
            plain, _, modifier = name.partition('+')
            factor = [prores(int(layer_index[i]), *ramp)] if modifier == 'prores' else []
            x = PLACEMENTS[plain](x, w, *parts, norm, int(layer_index[i]), int(depth), *factor)
        hidden.append(x)
    head = weights['head'] if 'head' in weights else np.swapaxes(weights['embed'], -1, -2)[..., None, :, :]
    return hidden, norm(x, weights['norm']) @ head


def loss(weights, ids, targets, weights_of_targets, placements, **kw):
    """ids, targets, weights_of_targets [B, T] -> [...]: sum of weighted cross-entropies / sum of weights."""
    logits = forward(weights, ids, placements, **kw)[1]
    given = np.asarray(weights_of_targets, np.float64)
    targets = np.where(given != 0, targets, 0)  # a target without weight may be out of range (-100)
    top = logits.real.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    index = np.broadcast_to(targets[..., None], (*logits.shape[:-1], 1))
    nll = log_sum - np.take_along_axis(logits, index, axis=-1)[..., 0]
    return (nll * given).sum(axis=(-2, -1)) / given.sum()


def gradients(weights, ids, targets, weights_of_targets, placements, *, chunk=256, **kw):
    """Gradient of `loss`, same structure as weights: Im loss(w + ih) / h. Squire and Trapp, SIAM Review 40 (1998)."""
    h = 1e-30
    weights = _map(_double, weights)

    def of(owner, name):  # one forward pass for `chunk` entries of the leaf, along a leading axis
        leaf, out = owner[name], np.empty(owner[name].size)
        for start in range(0, leaf.size, chunk):
            entries = np.arange(start, min(start + chunk, leaf.size))
            moved = np.tile(leaf.reshape(-1).astype(np.complex128), (len(entries), 1))
            moved[np.arange(len(entries)), entries] += 1j * h
            # To meet x [n, B, T, D]: embed [n, V, D] (looked up), gains [n, 1, 1, D], matrices [n, 1, in, out].
            ones = () if name == 'embed' else (1,) * (3 - leaf.ndim)
            owner[name] = moved.reshape(len(entries), *ones, *leaf.shape)
            out[entries] = loss(weights, ids, targets, weights_of_targets, placements, **kw).imag / h
        owner[name] = leaf
        return out.reshape(leaf.shape)

    grads = {name: of(weights, name) for name in weights if name != 'layers'}
    grads['layers'] = [{name: of(layer, name) for name in layer} for layer in weights['layers']]
    return grads


def init(rng, placements, *, V, D, H, K, F, hd=None, biases='', tied=False):
    """Random weights for each placement name: matrices normal (std 0.3, embed 1), vectors uniform in 0.5..1.5.

    biases: names of the matrices that have one, separated by blanks. tied: without a head.
    """
    hd = hd or D // H
    shapes = {'q': (D, H * hd), 'k': (D, K * hd), 'v': (D, K * hd), 'o': (H * hd, D)}
    shapes |= {'gate': (D, F), 'up': (D, F), 'down': (F, D)}
    layers = []
    for plain in (name.partition('+')[0] for name in placements):
        layer = {name: rng.normal(0.0, 0.3, shape) for name, shape in shapes.items()}
        layer |= {f'{name}_bias': rng.normal(0.0, 0.3, shapes[name][1]) for name in biases.split()}
        lengths = {'D': (D,), 'hd': (hd,), '0': ()}
        layers.append(layer | {name: rng.uniform(0.5, 1.5, lengths[of]) for name, of in VECTORS[plain].items()})
    embed, head = rng.normal(0.0, 1.0, (V, D)), rng.normal(0.0, 0.3, (D, V))
    whole = {'embed': embed, 'head': head, 'norm': rng.uniform(0.5, 1.5, D), 'layers': layers}
    whole |= {'embed_norm': rng.uniform(0.5, 1.5, D)} if placements[0].startswith('peri') else {}
    return {name: value for name, value in whole.items() if name != 'head' or not tied}


# --- Optimisers (one array; a gradient and a learning rate a step; the array after the last step) and measures


def adamw(params, grads_list, lrs, b1, b2, eps, weight_decay):
    """torch.optim.AdamW: decoupled decay p -= lr wd p first. Loshchilov and Hutter, arXiv 1711.05101."""
    p = np.array(params, np.float64)
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, (g, lr) in enumerate(zip(grads_list, lrs, strict=True), 1):
        g = np.asarray(g, np.float64)
        m = b1 * m + (1.0 - b1) * g
        v = b2 * v + (1.0 - b2) * g * g
        p = p - lr * weight_decay * p - lr * (m / (1.0 - b1**t)) / (np.sqrt(v / (1.0 - b2**t)) + eps)
    return p


def adam(params, grads_list, lrs, b1, b2, eps):
    """torch.optim.Adam: bias-corrected moments, eps outside the root. Kingma and Ba, arXiv 1412.6980."""
    return adamw(params, grads_list, lrs, b1, b2, eps, 0.0)


def sgd(params, grads_list, lrs, momentum, weight_decay):
    """torch.optim.SGD: m = momentum m + g, p -= lr m (Sutskever et al., ICML 2013); decay as in SGDW, 1711.05101."""
    p = np.array(params, np.float64)
    m = np.zeros_like(p)
    for g, lr in zip(grads_list, lrs, strict=True):
        m = momentum * m + np.asarray(g, np.float64)
        p = p - lr * weight_decay * p - lr * m
    return p


def lion(params, grads_list, lrs, b1, b2, weight_decay):
    """p -= lr (sign(b1 m + (1 - b1) g) + decay p); m = b2 m + (1 - b2) g. Chen et al., arXiv 2302.06675."""
    p, m = np.array(params, np.float64), np.zeros(np.shape(params))
    for g, lr in zip(grads_list, lrs, strict=True):
        g = np.asarray(g, np.float64)
        p = p - lr * (np.sign(b1 * m + (1 - b1) * g) + weight_decay * p)
        m = b2 * m + (1 - b2) * g
    return p


def muon(params, grads_list, lrs, momentum, weight_decay):
    """One matrix: Nesterov momentum, five Newton-Schulz steps towards an orthogonal matrix, 0.2 sqrt(max(in, out)).

    Liu et al., arXiv 2502.16982, eq. 1 and 4, Nesterov momentum as in their code and in Jordan et al. 2024
    (kellerjordan.github.io/posts/muon): buffer = momentum buffer + g; gradient = g + momentum buffer; no correction.
    """
    p, buffer = np.array(params, np.float64), np.zeros(np.shape(params))
    for g, lr in zip(grads_list, lrs, strict=True):
        g = np.asarray(g, np.float64)
        buffer = momentum * buffer + g
        ahead = g + momentum * buffer
        x = ahead.T if ahead.shape[0] > ahead.shape[1] else ahead
        x = x / (np.linalg.norm(x) + 1e-7)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x.T if ahead.shape[0] > ahead.shape[1] else x
        p = p - lr * (0.2 * np.sqrt(max(p.shape)) * x + weight_decay * p)
    return p


def galore(params, grads_list, lrs, rank, gap, scale, b1, b2, eps, weight_decay, projectors):
    """One matrix W [out, in] of torch: Adam on projected gradients. Zhao et al., arXiv 2403.03507, algorithm 2.

    Their code (GaLoreProjector, std) projects `in` where out >= in, else `out`. Moments outlive their projector. A
    decomposition leaves the sign of a vector open: it is that of `projectors`, one an update, [shorter side, rank].
    """
    W = np.array(params, np.float64).T
    m = v = P = 0.0
    for t, (g, lr) in enumerate(zip(grads_list, lrs, strict=True)):
        G = np.asarray(g, np.float64).T
        right = G.shape[0] >= G.shape[1]
        if t % gap == 0:
            U, _, Vt = np.linalg.svd(G, full_matrices=False)
            P = (Vt.T if right else U)[:, :rank]
            P = P * np.sign((P * projectors[t]).sum(0))
        R = G @ P if right else P.T @ G
        m = b1 * m + (1.0 - b1) * R
        v = b2 * v + (1.0 - b2) * R * R
        N = (m / (1.0 - b1 ** (t + 1))) / (np.sqrt(v / (1.0 - b2 ** (t + 1))) + eps)
        W = W - lr * (scale * (N @ P.T if right else P @ N) + weight_decay * W)
    return W.T


def adafactor(params, grads_list, lrs, weight_decay):
    """One array: Shazeer and Stern, arXiv 1804.04235, algorithms 4 (matrices from 128 x 128 on), 5 and section 8.

    Decay at the array's own rate, lr times its root mean square, as in Hugging Face's Adafactor.
    """
    rms = lambda a: np.sqrt(np.mean(a * a))  # noqa: E731
    p = np.array(params, np.float64)
    rows = columns = v = 0.0
    for t, (g, lr) in enumerate(zip(grads_list, lrs, strict=True), start=1):
        g = np.asarray(g, np.float64)
        b2, squares = 1.0 - t**-0.8, g * g + 1e-30
        if p.ndim == 2 and min(p.shape) >= 128:
            rows = b2 * rows + (1.0 - b2) * squares.mean(axis=1)
            columns = b2 * columns + (1.0 - b2) * squares.mean(axis=0)
            v = np.outer(rows, columns) / rows.mean()
        else:
            v = b2 * v + (1.0 - b2) * squares
        u = g / np.sqrt(v)
        p = p - lr * max(1e-3, rms(p)) * (u / max(1.0, rms(u)) + weight_decay * p)
    return p


def angular_distance(u, v):
    """u, v [..., D] -> [...]: arccos(cosine) / pi, in 0..1. Gromov et al., arXiv 2403.17887."""
    u, v = np.asarray(u, np.float64), np.asarray(v, np.float64)
    cosine = (u * v).sum(axis=-1) / np.sqrt((u * u).sum(axis=-1) * (v * v).sum(axis=-1))
    return np.arccos(np.clip(cosine, -1.0, 1.0)) / np.pi
