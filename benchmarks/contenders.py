"""Train steps, and generation, to be timed, each in a process of its own: ours, and Hugging Face's in PyTorch."""

import dataclasses
import os
import pathlib
import resource
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe of configs/, rows, tokens of a row, and where and in what to compute."""

    recipe: str
    batch_size: int
    length: int
    device: str
    dtype: str

    def config(self, settings):
        """The recipe's config with `settings` {key: value}."""
        from mixln_jax import config as configs
        from mixln_jax import recipes

        given = {'batch_size': self.batch_size, 'seq_length': self.length, 'num_steps': 1000, 'device': self.device}
        given |= {'compute_dtype': self.dtype, 'mesh.data': 1} | settings
        values = recipes.load(f'{ROOT}/configs/{self.recipe}.py', [(key, str(value)) for key, value in given.items()])
        return configs.build(values)

    def tokens(self, vocab_size):
        """Random ids [B,T+1]."""
        return np.random.default_rng(0).integers(0, vocab_size, (self.batch_size, self.length + 1), np.int32)


def serve(pipe, name, arguments):
    """Answers with what a contender is, then to every number of steps with their time, to None with its memory."""
    try:
        start = time.monotonic()
        steps, memory, about = globals()[name](*arguments)
        steps(3)
        pipe.send(about | {'compile_seconds': time.monotonic() - start})
        while count := pipe.recv():
            start = time.perf_counter()
            steps(count)
            pipe.send({'seconds': time.perf_counter() - start})
        pipe.send({'peak_bytes': memory()})
    except Exception as error:  # it goes into the table, whatever it was
        pipe.send({'error': f'{type(error).__name__}: {error}'.splitlines()[0]})


def ours(case, settings):
    """mixln_jax: (steps(count) that blocks, peak memory in bytes(), about).

    Of `settings` XLA_FLAGS goes to XLA; heap=default leaves glibc's heap as it is.
    """
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # others want memory too
    settings = dict(settings)
    if flags := settings.pop('XLA_FLAGS', None):
        os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flags}'
    heap = settings.pop('heap', 'kept')
    import jax

    from mixln_jax.distributed import mesh as meshes
    from mixln_jax.program.program import Program
    from mixln_jax.system import hardware

    config = case.config(settings)
    if heap == 'kept':
        meshes.keep_heap(config.device)
    mesh = meshes.make_mesh(config.mesh, meshes.devices(config.device)[:1])
    program, sizes, device = Program(config, mesh), config.model, mesh.devices.flat[0]
    ids = case.tokens(sizes.vocab_size)
    batch = {'inputs': ids[:, :-1], 'targets': ids[:, 1:], 'loss_mask': np.ones_like(ids[:, 1:], np.float32)}
    batch = meshes.to_devices(batch, meshes.batch_sharding(mesh))
    step = program.train_step.lower(program.state, batch).compile()
    state = program.init(jax.random.key(0))
    matmul = _matmul_peak(device, case.dtype)

    def steps(count):
        nonlocal state
        for _ in range(count):
            state, values = step(state, batch)
        values['loss'].block_until_ready()

    def memory():
        used = device.memory_stats()
        return used['peak_bytes_in_use'] if used else _resident()

    tokens = case.batch_size * case.length
    kind = device.device_kind if device.platform != 'cpu' else f'CPU, {len(os.sched_getaffinity(0))} cores'
    return steps, memory, {
        'tokens': tokens, 'flops': tokens * program.flops_per_position(), 'device': kind,
        'peak': getattr(hardware.DEVICES.get(device.device_kind), 'flops', None), 'matmul_peak': matmul,
    }  # fmt: skip


def _matmul_peak(device, dtype):
    """FLOP/s of a large square matrix product, the best of some."""
    import jax
    import jax.numpy as jnp

    n = 2048 if device.platform == 'cpu' else 8192
    a = jax.device_put(np.random.default_rng(0).normal(size=(n, n)).astype(np.float32), device).astype(dtype)
    product = jax.jit(lambda a: jnp.dot(a, a) / n)
    product(a).block_until_ready()
    best = float('inf')
    for _ in range(5):
        start, made = time.perf_counter(), a
        for _ in range(10 if device.platform != 'cpu' else 1):
            made = product(made)
        made.block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 * (10 if device.platform != 'cpu' else 1) / best


def hugging_face(case, how):
    """LlamaForCausalLM in PyTorch, `compiled` or `eager`: as `ours`."""
    import torch
    import transformers

    config = case.config({})
    sizes = config.model
    device = 'cuda' if torch.cuda.is_available() and case.device != 'cpu' else 'cpu'
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    pure = how == 'eager' and case.dtype == 'bfloat16'
    like = transformers.LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads or sizes.num_heads,
        max_position_embeddings=case.length,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation='sdpa',
    )
    model = transformers.LlamaForCausalLM(like).to(device, torch.bfloat16 if pure else torch.float32).train()
    optim = config.optim
    fused = how == 'compiled' or device == 'cpu'
    rule = torch.optim.AdamW if fused else torch.optim.Adam  # the authors' is Adam
    optimizer = rule(model.parameters(), lr=1e-3, betas=(optim.b1, optim.b2), weight_decay=0, fused=fused)
    forward = torch.compile(model) if how == 'compiled' else model
    ids = torch.from_numpy(case.tokens(sizes.vocab_size)[:, :-1].astype(np.int64)).to(device)

    def steps(count):
        for _ in range(count):
            with torch.autocast(device, torch.bfloat16, enabled=case.dtype == 'bfloat16' and not pure):
                loss = forward(input_ids=ids, labels=ids).loss
            loss.backward()
            if optim.clip_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()  # which waits for the device

    def memory():
        return torch.cuda.max_memory_allocated() if device == 'cuda' else _resident()

    from mixln_jax.models import network

    named = {name: parameter.numel() for name, parameter in model.named_parameters()}
    embedding = named['model.embed_tokens.weight']
    tokens = case.batch_size * case.length
    of_position = network.flops_per_position(
        sum(named.values()), embedding, sizes.num_layers, sizes.hidden_size, case.length
    )
    return steps, memory, {
        'tokens': tokens, 'flops': tokens * of_position, 'device': '', 'peak': None, 'matmul_peak': None,
        'torch': torch.__version__, 'transformers': transformers.__version__,
    }  # fmt: skip


def generate_ours(case, folder, new):
    """mixln_jax: (steps(count) that generates `new` tokens `count` times, peak memory in bytes(), about). It writes its
    random weights into `folder` first, for `generate_hugging_face`."""
    import jax

    from mixln_jax.distributed import mesh as meshes
    from mixln_jax.models import families
    from mixln_jax.models.hf import llama
    from mixln_jax.models.sampler import Sampler
    from mixln_jax.models.sampling import Sampling

    sizes = case.config({'model.norm_position': 'pre'}).model
    devices = meshes.devices(case.device)[:1]
    model = families.from_config(sizes, case.dtype)
    params = jax.jit(model.init)(jax.random.key(0))['params']
    llama.save(folder, model, jax.device_get(params))
    window, ids = case.length + new, case.tokens(sizes.vocab_size)[:, :-1].tolist()
    sampler = Sampler(model, window, meshes.make_mesh(case.config({}).mesh, devices))

    def steps(count):
        for _ in range(count):
            made = sampler.generate(params, ids, max_new=new, sampling=Sampling(temperature=0))
            assert all(len(row.ids) == new for row in made)

    return steps, _resident, _about_generation(case, new, devices[0].device_kind)


def generate_hugging_face(case, folder, new):
    """LlamaForCausalLM.generate in PyTorch, as `generate_ours`, whose weights it reads."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = 'cuda' if torch.cuda.is_available() and case.device != 'cpu' else 'cpu'
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, case.dtype)).to(device).eval()
    ids = torch.from_numpy(case.tokens(model.config.vocab_size)[:, :-1].astype(np.int64)).to(device)

    def steps(count):
        for _ in range(count):
            made = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
            assert made.shape[1] == case.length + new

    about = {'torch': torch.__version__, 'transformers': transformers.__version__}
    return steps, _resident, _about_generation(case, new, '') | about


def _about_generation(case, new, device):
    return {'tokens': case.batch_size * new, 'device': device, 'peak': None, 'matmul_peak': None}


def _resident():
    """Most memory that this process has had, bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
