"""The store: what enters it, against plain torch hooks on Hugging Face; files whole or not at all; errors."""

import copy
import json
import re
import shutil

import pytest
import torch

from scope_lens.model import ScopeModel
from scope_lens.training import ActivationStore
from scope_lens.training import harvest as harvesting
from scope_lens.training import store as storing

RES, Z = "blocks.0.hook_resid_post", "blocks.1.attn.hook_z"
NORMED, MLP = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
SITES = (RES, Z, NORMED, MLP)
BOS, EOS, PAD = 2, 1, 0


@pytest.fixture
def hf(hf_model):
    model = hf_model("gemma2")
    model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id = BOS, EOS, PAD
    return model


@pytest.fixture
def model(hf):
    return ScopeModel.from_hf(copy.deepcopy(hf))


@pytest.fixture
def tokens():
    ids = torch.randint(3, 199, (10, 12))
    ids[:, 0] = BOS
    ids[3, 5] = EOS
    ids[4, 9:] = PAD
    return ids


def harvest(model, tokens, **settings):
    return ActivationStore.harvest(
        model, tokens, **({"sites": SITES, "dtype": torch.float32, "batch_size": 3, "progress": False} | settings)
    )


def by_plain_hooks(hf, tokens):
    """Each site's rows from Hugging Face modules, BOS, EOS and PAD rows left out, in the order of the tokens."""
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
    kept = (tokens != BOS) & (tokens != EOS) & (tokens != PAD)
    return {site: rows[kept] for site, rows in caught.items()}


def in_order(rows):
    return rows[rows[:, 0].argsort()]


def test_rows_are_the_models_activations_at_ordinary_tokens(hf, model, tokens):
    store = harvest(model, tokens)
    assert store.rows == 10 * 12 - 10 - 1 - 3
    for site, expected in by_plain_hooks(hf, tokens).items():
        (rows,) = next(store.batches(site, size=store.rows))
        assert rows.shape == expected.shape == (store.rows, store.width(site))
        torch.testing.assert_close(in_order(rows), in_order(expected), rtol=1e-5, atol=1e-5)
        assert store.scale(site) == pytest.approx(expected.double().pow(2).sum(1).mean().sqrt().item(), rel=1e-5)


def test_a_pair_of_sites_gives_rows_of_the_same_tokens(hf, model, tokens):
    store = harvest(model, tokens)
    expected = by_plain_hooks(hf, tokens)
    table = {tuple(x[:4].tolist()): y for x, y in zip(*(next(store.batches((NORMED, MLP), size=999))), strict=True)}
    ours = harvest(model, tokens)
    for x, y in ours.batches((NORMED, MLP), size=7):
        for row_x, row_y in zip(x, y, strict=True):
            distance, match = (expected[NORMED] - row_x).norm(dim=1).min(0)
            assert distance < 1e-4
            torch.testing.assert_close(row_y, expected[MLP][match], rtol=1e-4, atol=1e-4)
    assert len(table) == store.rows


def test_a_pass_is_shuffled_complete_and_repeatable(model, tokens):
    store = harvest(model, tokens, sites=[RES])
    first = torch.cat([x for (x,) in store.batches(RES, size=25, seed=4)])
    again = torch.cat([x for (x,) in store.batches(RES, size=10, seed=4)])
    other = torch.cat([x for (x,) in store.batches(RES, size=25, seed=5)])
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(in_order(first), in_order(other))


def test_rows_bounds_the_sample(model, tokens):
    everything = {
        tuple(row) for (x,) in harvest(model, tokens, sites=[RES]).batches(RES, size=50) for row in x.tolist()
    }
    store = harvest(model, tokens, sites=[RES], rows=30)
    (sample,) = next(store.batches(RES, size=99))
    assert len(sample) == store.rows == 30
    assert {tuple(row) for row in sample.tolist()} < everything
    other = next(harvest(model, tokens, sites=[RES], rows=30, seed=1).batches(RES, size=99))[0]
    assert not torch.equal(in_order(sample), in_order(other))


def test_the_forward_stops_after_the_last_site(model, tokens):
    later = []
    model.model.hook_dict["blocks.1.ln2.hook_in"].add_hook(lambda tensor, hook: later.append(hook.name))
    harvest(model, tokens, sites=[RES, Z])
    assert later == []
    harvest(model, tokens, sites=[MLP])
    assert later


def test_text_is_packed_behind_bos_and_every_token_of_it_is_kept(shared_data, monkeypatch):
    model = ScopeModel.from_pretrained(shared_data / "tiny-gemma2-stories")
    monkeypatch.setattr(harvesting, "_LONGEST_CONTEXT", 32)
    documents = ["Once upon a time there was a cat."] * 9
    plan = harvesting.HarvestPlan.make(model, documents, sites=[RES], rows=10**6, seed=0)
    ids = model.model.tokenizer(documents[0], add_special_tokens=False)["input_ids"]
    (tokens,), (row_of,) = plan.tokens, plan.row_of
    assert tokens.shape[1] == 32
    assert (tokens[:, 0] == BOS).all()
    assert plan.rows == 9 * len(ids)
    assert tokens[row_of >= 0].tolist() == ids * 9
    store = ActivationStore.harvest(model, documents[:1], sites=[RES], progress=False)
    assert store.rows == len(ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_folder_gives_what_memory_gives(model, tokens, tmp_path, dtype):
    kept = harvest(model, tokens, dtype=dtype)
    made = harvest(model, tokens, dtype=dtype, path=tmp_path / "store")
    opened = ActivationStore.open(tmp_path / "store")
    assert kept.manifest == made.manifest == opened.manifest
    for site in SITES:
        rows = [next(store.batches(site, size=999))[0] for store in (kept, made, opened)]
        assert torch.equal(rows[0], rows[1])
        assert torch.equal(rows[0], rows[2])
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]


def test_a_killed_harvest_goes_on_where_it_stopped(model, tokens, tmp_path, monkeypatch, capsys):
    """With settings of its own: a harvest of a few batches notes what is done when it is broken off."""
    whole = harvest(model, tokens)
    run, seen = harvesting._activations, []

    def dying(model, batch, **settings):
        seen.append(len(batch))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return run(model, batch, **settings)

    monkeypatch.setattr(harvesting, "_activations", dying)
    with pytest.raises(KeyboardInterrupt):
        harvest(model, tokens, path=tmp_path / "store")
    with pytest.raises(FileNotFoundError, match="unfinished"):
        ActivationStore.open(tmp_path / "store")
    with pytest.raises(ValueError, match="unfinished harvest of other data"):
        harvest(model, tokens, path=tmp_path / "store", seed=7)
    seen.clear()
    monkeypatch.setattr(harvesting, "_activations", lambda *a, **k: seen.append(len(a[1])) or run(*a, **k))
    capsys.readouterr()
    resumed = harvest(model, tokens, path=tmp_path / "store", progress=True)
    assert re.search(r"harvest, resumed:  60%.* 6/10 ", capsys.readouterr().err)
    assert [n for n in seen if n != 1] == [3]  # two batches of three were kept; one of three and the last one were left
    assert resumed.manifest == whole.manifest
    for site in SITES:
        assert torch.equal(*(next(store.batches(site, size=999))[0] for store in (whole, resumed)))


def rows_at(store, site=RES):
    return store.take([site], torch.arange(store.rows))[0]


def test_a_harvest_that_dies_without_a_word_has_noted_its_progress(model, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(storing, "_SECONDS_BETWEEN_NOTES", 0)
    snapshots = []

    def photograph(*args, **settings):
        if (tmp_path / "store.part" / "site_0.npy").exists():
            snapshots.append(shutil.copytree(tmp_path / "store.part", tmp_path / f"{len(snapshots)}" / "store.part"))
        return run(*args, **settings)

    run = harvesting._activations
    monkeypatch.setattr(harvesting, "_activations", photograph)
    whole = harvest(model, tokens, path=tmp_path / "store", sites=[RES])
    monkeypatch.setattr(harvesting, "_activations", run)
    assert [json.loads((part / "progress.json").read_text())["sequences"] for part in snapshots] == [0, 3, 6, 9]
    for part in snapshots:  # what a kill before this batch would have left
        resumed = harvest(model, tokens, path=part.parent / "store", sites=[RES])
        assert torch.equal(rows_at(resumed), rows_at(whole))


def test_a_harvest_begun_anew_forgets_the_old_note(model, tokens, tmp_path, monkeypatch):
    run, calls = harvesting._activations, []

    def dying(*args, **settings):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(*args, **settings)

    monkeypatch.setattr(harvesting, "_activations", dying)
    with pytest.raises(KeyboardInterrupt):
        harvest(model, tokens, path=tmp_path / "store")
    note = tmp_path / "store.part" / "progress.json"
    assert json.loads(note.read_text())["sequences"] == 3
    seen = []
    monkeypatch.setattr(
        harvesting, "_activations", lambda *a, **k: seen.append(json.loads(note.read_text())) or run(*a, **k)
    )
    harvest(model, tokens, path=tmp_path / "store", resume=False)
    assert seen[1]["sequences"] == 0


@pytest.mark.parametrize("pad", [BOS, EOS], ids=["pad is bos", "pad is eos"])
@pytest.mark.parametrize("architecture", ["gemma2", "gpt2"])
def test_a_pad_that_is_bos_or_eos_hides_neither(hf_model, tokens, architecture, pad):
    hf = hf_model(architecture)
    hf.config.bos_token_id, hf.config.eos_token_id, hf.config.pad_token_id = BOS, EOS, pad
    model = ScopeModel.from_hf(hf)
    tokens[4, 9:] = pad
    mask = torch.ones_like(tokens)
    if pad == EOS:  # in front of BOS it is padding
        tokens[5, :4], tokens[5, 4], mask[5, :4] = EOS, BOS, 0
    _, cache = model.model.run_with_cache(tokens, attention_mask=mask)
    store = harvest(model, tokens, sites=RES)
    torch.testing.assert_close(rows_at(store), cache[RES][(tokens != BOS) & (tokens != EOS)], rtol=1e-5, atol=1e-5)


def test_tensors_of_several_widths_are_harvested_one_after_the_other(model, tokens, tmp_path, monkeypatch):
    parts = [tokens[:4], tokens[4:7, :9], tokens[7:, :9]]
    expected = torch.cat([rows_at(harvest(model, part, sites=RES)) for part in parts])
    store = harvest(model, iter(parts), sites=RES, path=tmp_path / "store")
    torch.testing.assert_close(rows_at(store), expected, rtol=1e-5, atol=1e-5)
    run, calls = harvesting._activations, []

    def dying(*args, **settings):
        calls.append(1)
        if len(calls) == 5:  # after the two batches of the first width and one of the second
            raise KeyboardInterrupt
        return run(*args, **settings)

    monkeypatch.setattr(harvesting, "_activations", dying)
    with pytest.raises(KeyboardInterrupt):
        harvest(model, parts, sites=RES, path=tmp_path / "broken")
    assert json.loads((tmp_path / "broken.part" / "progress.json").read_text())["sequences"] == 7
    assert torch.equal(rows_at(harvest(model, parts, sites=RES, path=tmp_path / "broken")), rows_at(store))


def test_a_finished_folder_is_opened_again_or_refused(model, tokens, tmp_path):
    store = harvest(model, tokens, path=tmp_path / "store")
    assert harvest(model, tokens, path=tmp_path / "store").manifest == store.manifest
    with pytest.raises(ValueError, match="another harvest"):
        harvest(model, tokens, path=tmp_path / "store", seed=3)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(other.parameters())).mul_(1.01)
    with pytest.raises(ValueError, match="another harvest"):
        harvest(other, tokens, path=tmp_path / "store")
    with pytest.raises(FileExistsError, match="resume is off"):
        harvest(model, tokens, path=tmp_path / "store", resume=False)


def test_bad_requests_are_refused(model, tokens, tmp_path):
    with pytest.raises(KeyError, match="hook_resid_post"):
        harvest(model, tokens, sites=["blocks.0.hook_resid_psot"])
    with pytest.raises(ValueError, match="each named once"):
        harvest(model, tokens, sites=[RES, RES])
    with pytest.raises(ValueError, match="no activation to harvest"):
        harvest(model, torch.full((3, 4), BOS))
    for rows in (0, -1):
        with pytest.raises(ValueError, match=f"rows is {rows}; expected 1 row or more"):
            harvest(model, tokens, rows=rows)
    with pytest.raises(ValueError, match="batch_size is 0; expected 1 sequence or more"):
        harvest(model, tokens, batch_size=0)
    with pytest.raises(ValueError, match="rows of 132 tokens, but the model's context is 128"):
        harvest(model, tokens.repeat(1, 11))
    with pytest.raises(ValueError, match=r"expected integer ids of shape \(seq, pos\), found torch.float32"):
        harvest(model, iter([tokens.float()]))
    with pytest.raises(ValueError, match="ids from 1 to 199, but the model's vocabulary has the ids 0 to 198"):
        harvest(model, tokens.clamp(min=1).index_fill(1, torch.tensor(7), 199))
    with pytest.raises(ValueError, match=r"10 of 10 rows do not begin with BOS \(id 2\)"):
        harvest(model, tokens[:, 1:])
    with pytest.raises(ValueError, match="no tokens to harvest: nothing was given"):
        harvest(model, [])
    with pytest.raises(ValueError, match=r"dtype=torch\.float64"):
        harvest(model, tokens, dtype=torch.float64)
    with pytest.raises(ValueError, match="Text needs a tokenizer and this model has none"):
        harvest(model, ["no tokenizer here"])
    with pytest.raises(FileNotFoundError, match="Harvest one"):
        ActivationStore.open(tmp_path)
    store = harvest(model, tokens, sites=[RES])
    with pytest.raises(KeyError, match=r"no site 'blocks\.9\.hook_out'.*blocks\.0\.hook_resid_post"):
        store.batches("blocks.9.hook_out", size=4)
    with pytest.raises(ValueError, match="size=0"):
        store.batches(RES, size=0)


def test_damaged_files_are_refused(model, tokens, tmp_path):
    harvest(model, tokens, sites=[RES], path=tmp_path / "store")
    array = tmp_path / "store" / "site_0.npy"
    content = array.read_bytes()
    array.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"site_0\.npy cannot be read"):
        ActivationStore.open(tmp_path / "store")
    array.write_bytes(content)
    manifest = tmp_path / "store" / "manifest.json"
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(fields | {"rows": 5}))
    with pytest.raises(ValueError, match=r"manifest\.json says float32"):
        ActivationStore.open(tmp_path / "store")
    manifest.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        ActivationStore.open(tmp_path / "store")


def test_activations_that_are_not_finite_are_refused(hf, tokens):
    with torch.no_grad():
        hf.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        harvest(ScopeModel.from_hf(hf), tokens, sites=[RES])
