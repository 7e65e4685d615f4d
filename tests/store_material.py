"""What the tests of the activation store share: sites, a harvest with small settings, rows by plain torch hooks."""

import copy

import tensorstore as ts
import torch
from conftest import VOCAB, make_hf

from scope_lens.model import ScopeModel
from scope_lens.training import ActivationStore
from scope_lens.training.store import harvest as harvesting
from scope_lens.training.store import harvest_folder, placement, reader, zarr_rows

RES, Z = "blocks.0.hook_resid_post", "blocks.1.attn.hook_z"
NORMED, MLP = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
SITES = (RES, Z, NORMED, MLP)
BOS, EOS, PAD = 2, 1, 0


def hf_gemma(architecture="gemma2"):
    """A tiny Hugging Face model that names its special tokens."""
    hf = make_hf(architecture)
    hf.config.bos_token_id, hf.config.eos_token_id, hf.config.pad_token_id = BOS, EOS, PAD
    return hf


def bridged(hf=None):
    return ScopeModel.from_hf(copy.deepcopy(hf or hf_gemma()))


def token_ids(rows=10, pos=12):
    """Rows with BOS in front; one has an EOS, one ends in padding."""
    ids = torch.randint(3, VOCAB, (rows, pos), generator=torch.Generator().manual_seed(5))
    ids[:, 0] = BOS
    ids[3, 5] = EOS
    ids[4, 9:] = PAD
    return ids


def harvest(model, tokens, **settings):
    defaults = {"sites": SITES, "dtype": torch.float32, "batch_size": 3, "progress": False}
    return ActivationStore.harvest(model, tokens, **defaults | settings)


def stream(model, tokens, **settings):
    defaults = {"sites": SITES, "dtype": torch.float32, "batch_size": 3, "progress": False}
    return ActivationStore.stream(model, tokens, **defaults | settings)


def shrink(monkeypatch=None, *, bucket=128, shard=64, chunk=16, window=2):
    """Buckets, files, blocks and windows of a few rows, so that small stores have several of each."""
    # Waiting for the disk after each of so many small files takes most of the time, and only a power cut needs it.
    unsynced = {"cache_pool": {"total_bytes_limit": 0}, "file_io_mode": {"mode": "memmap"}, "file_io_sync": False}
    small = {
        (placement, "BUCKET_ROWS"): bucket, (harvest_folder, "BUCKET_ROWS"): bucket,
        (zarr_rows, "SHARD_ROWS"): shard, (harvest_folder, "SHARD_ROWS"): shard, (harvesting, "SHARD_ROWS"): shard,
        (zarr_rows, "CHUNK_ROWS"): chunk, (harvest_folder, "CHUNK_ROWS"): chunk, (reader, "CHUNK_ROWS"): chunk,
        (reader, "_WINDOW_BLOCKS"): window, (zarr_rows, "_context"): lambda: ts.Context(unsynced),
    }  # fmt: skip
    for (module, name), value in small.items():
        if monkeypatch is None:
            setattr(module, name, value)
        else:
            monkeypatch.setattr(module, name, value)


def one_pass(store, *sites, seed=0):
    """All rows of a pass, in the order that a reader gives them: doc, pos, token id and each site's rows."""
    read = store.reader(sites, size=store.rows, seed=seed)
    batch = read.next()
    return read.origin(), *(batch[site] for site in sites)


def at_place(store, site):
    """{(doc, pos): row} of a store."""
    origin, rows = one_pass(store, site)
    return dict(zip(zip(origin.doc.tolist(), origin.pos.tolist(), strict=True), rows, strict=True))


def by_plain_hooks(hf, tokens):
    """Each site's rows at every position, from the modules of Hugging Face."""
    caught = {}
    layers = hf.model.layers

    def keep_input(site):
        return lambda module, args: caught.__setitem__(site, args[0])

    def keep_output(site):
        return lambda module, args, out: caught.__setitem__(site, out[0] if isinstance(out, tuple) else out)

    handles = [
        layers[0].register_forward_hook(keep_output(RES)),
        layers[1].self_attn.o_proj.register_forward_pre_hook(keep_input(Z)),
        layers[1].pre_feedforward_layernorm.register_forward_pre_hook(keep_input(NORMED)),
        layers[1].post_feedforward_layernorm.register_forward_hook(keep_output(MLP)),
    ]
    with torch.no_grad():
        hf(tokens, attention_mask=(tokens != PAD).long())
    for handle in handles:
        handle.remove()
    x = caught[NORMED]
    caught[NORMED] = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + hf.config.rms_norm_eps)
    return caught
