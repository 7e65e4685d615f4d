"""Files become dictionaries: right ones exactly, wrong ones with an error that names them; never more than one copy."""

import dataclasses
import io
import math
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from scope_lens import HookedSAE
from scope_lens.releases import Release, from_path, load, open_suite, read_npz

REPO, PATH = "google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"
ARRAYS = ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"]


def arrays(d_in: int = 12, d_sae: int = 20, d_out: int | None = None, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(d_in + d_sae)
    d_out = d_out or d_in
    decoder = rng.standard_normal((d_sae, d_out))
    drawn = {
        "W_enc": rng.standard_normal((d_in, d_sae)),
        "W_dec": decoder / np.linalg.norm(decoder, axis=1, keepdims=True),
        "b_enc": rng.standard_normal(d_sae),
        "b_dec": rng.standard_normal(d_out),
        "threshold": rng.uniform(0.1, 1.0, d_sae),
    }
    return {name: array.astype(dtype) for name, array in drawn.items()}


def write(folder: Path, content: dict[str, np.ndarray], *, save=np.savez) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / "params.npz", **content)
    return folder / "params.npz"


def read(file: Path, **settings) -> HookedSAE:
    return read_npz(file, hook_in="blocks.0.hook_resid_post", hook_out="blocks.0.hook_resid_post", **settings)


# ---- right files ----


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_arrays_arrive_as_they_are(tmp_path, save, order, dtype):
    content = {name: np.asarray(array, order=order) for name, array in arrays(dtype=dtype).items()}
    file = write(tmp_path, content, save=save)
    for source in (file, tmp_path, str(tmp_path)):
        sae = read(source, dtype=torch.float64)
        for name, array in content.items():
            assert np.array_equal(getattr(sae, name).detach().numpy(), array.astype("float64"))
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.d_out, sae.cfg.activation) == (12, 20, 12, "jumprelu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once_and_spares_the_threshold(tmp_path, dtype):
    content = arrays()
    sae = read(write(tmp_path, content), dtype=dtype, scale=3.0)
    for name, array in content.items():
        scaled = torch.from_numpy(array) * (1.0 if name.startswith("W_") else 3.0)
        wanted = torch.float32 if name == "threshold" else dtype
        assert getattr(sae, name).dtype == wanted
        assert torch.equal(getattr(sae, name), scaled.to(wanted))


def test_arrays_larger_than_a_piece_are_read_whole(tmp_path):
    content = arrays(d_in=300, d_sae=700)
    file = write(tmp_path, content)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        sae = read(file, dtype=dtype)
        for name in ("W_enc", "W_dec"):
            assert torch.equal(getattr(sae, name), torch.from_numpy(content[name]).to(dtype))


def test_parameters_can_be_trained_and_share_no_memory_with_each_other(tmp_path):
    sae = read(write(tmp_path, arrays()))
    sae(torch.randn(3, 12)).sum().backward()
    assert sae.W_enc.grad is not None
    assert len({parameter.data_ptr() for parameter in sae.parameters()}) == 5


# ---- releases ----


@pytest.mark.parametrize(
    ("repo", "path", "d_in", "hook_in", "hook_out", "model"),
    [
        ("2b-pt-res", "layer_20/width_16k/average_l0_71", 2304, "20.hook_resid_post", "20.hook_resid_post", "2b"),
        ("2b-pt-mlp", "layer_3/width_65k/average_l0_9", 2304, "3.hook_mlp_out", "3.hook_mlp_out", "2b"),
        ("2b-pt-att", "layer_0/width_16k/average_l0_1", 2048, "0.attn.hook_z", "0.attn.hook_z", "2b"),
        ("2b-pt-transcoders", "layer_7/width_16k/average_l0_70", 2304, "7.ln2.hook_normalized", "7.hook_mlp_out", "2b"),
        ("9b-pt-res", "layer_41/width_131k/average_l0_41", 3584, "41.hook_resid_post", "41.hook_resid_post", "9b"),
        ("9b-pt-mlp", "layer_41/width_16k/average_l0_41", 3584, "41.hook_mlp_out", "41.hook_mlp_out", "9b"),
        ("9b-pt-att", "layer_2/width_16k/average_l0_41", 4096, "2.attn.hook_z", "2.attn.hook_z", "9b"),
        ("27b-pt-res", "layer_22/width_131k/average_l0_82", 4608, "22.hook_resid_post", "22.hook_resid_post", "27b"),
        ("9b-it-res", "layer_9/width_16k/average_l0_88", 3584, "9.hook_resid_post", "9.hook_resid_post", "9b-it"),
    ],
)  # fmt: skip
def test_every_repository_loads_to_its_hooks(tmp_path, repo, path, d_in, hook_in, hook_out, model):
    write(tmp_path / path, arrays(d_in, 16))
    sae = load(from_path(f"google/gemma-scope-{repo}", path), local_dir=tmp_path)
    cfg = sae.cfg
    assert (cfg.hook_in, cfg.hook_out) == (f"blocks.{hook_in}", f"blocks.{hook_out}")
    assert (cfg.model, cfg.release, cfg.path) == (f"google/gemma-2-{model}", f"google/gemma-scope-{repo}", path)
    assert (cfg.d_in, cfg.d_out, cfg.d_sae) == (d_in, d_in, 16)  # the width is the arrays', not the path's
    assert ("chat_prefix" in cfg.untrained) == (model == "9b-it")
    assert {"bos", "eos", "pad"} <= set(cfg.untrained)


@pytest.mark.parametrize(("repo", "d_model"), [("gemma-scope-2b-pt-res", 2304), ("gemma-scope-9b-pt-res", 3584)])
def test_an_embedding_dictionary_reads_and_writes_scaled_embeddings(tmp_path, repo, d_model):
    """x_hat'(s e) = s x_hat(e) with s = sqrt(d_model), against the file's own equations in numpy."""
    content = arrays(d_model, 24, dtype="float64")
    write(tmp_path, content)
    sae = load(from_path(repo, "embedding/width_4k/average_l0_6"), local_dir=tmp_path, dtype=torch.float64)
    rows = np.random.default_rng(5).standard_normal((50, d_model)) / math.sqrt(d_model)
    pre = rows @ content["W_enc"] + content["b_enc"]
    acts = np.where(pre > content["threshold"], pre, 0.0)
    recons = acts @ content["W_dec"] + content["b_dec"]
    scale = math.sqrt(d_model)
    hook_embed = torch.from_numpy(rows * scale)
    assert 0.1 < (acts > 0).mean() < 0.9
    assert np.array_equal(sae.encode(hook_embed).detach().numpy() > 0, acts > 0)
    np.testing.assert_allclose(sae.encode(hook_embed).detach().numpy(), scale * acts, rtol=1e-11)
    np.testing.assert_allclose(sae(hook_embed).detach().numpy(), scale * recons, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(sae.W_dec.detach().norm(dim=1).numpy(), 1.0, rtol=1e-12)
    assert (sae.cfg.hook_in, sae.cfg.hook_out) == ("hook_embed", "hook_embed")


def test_from_pretrained_is_load(tmp_path):
    write(tmp_path / PATH, arrays(2304, 6))
    direct = load(from_path(REPO, PATH), local_dir=tmp_path, dtype=torch.bfloat16)
    for path in (PATH, f"{PATH}/params.npz", "layer_20/width_16k/canonical"):
        sae = HookedSAE.from_pretrained(REPO, path, local_dir=tmp_path, dtype=torch.bfloat16)
        assert sae.cfg == direct.cfg
        assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), direct.parameters(), strict=True))


@pytest.mark.parametrize("place", ["google/gemma-scope-2b-pt-res/" + PATH, "gemma-scope-2b-pt-res/" + PATH, PATH, "."])
def test_a_mirror_may_be_laid_out_in_four_ways(tmp_path, place):
    file = write(tmp_path / place, arrays(2304, 6))
    for folder in (tmp_path, file):
        assert load(from_path(REPO, PATH), local_dir=folder).cfg.d_sae == 6


def test_a_mirror_without_the_file_says_where_it_looked(tmp_path):
    write(tmp_path / "layer_20" / "width_16k" / "average_l0_38", arrays(2304, 6))
    with pytest.raises(FileNotFoundError) as error:
        load(from_path(REPO, PATH), local_dir=tmp_path)
    text = str(error.value)
    places = [tmp_path / REPO / PATH, tmp_path / "gemma-scope-2b-pt-res" / PATH, tmp_path / PATH, tmp_path]
    assert all(f"\n  {place / 'params.npz'}" in text for place in places)
    assert "which holds layer_20" in text
    assert "leave local_dir out to download it" in text
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist"):
        load(from_path(REPO, PATH), local_dir=tmp_path / "nowhere")


def test_a_record_that_contradicts_its_path_is_refused(tmp_path):
    fields = {"repo": REPO, "path": PATH, "model": "google/gemma-2-2b", "site": "res", "width": 16384, "l0": 71}
    with pytest.raises(ValueError, match=r"'res', 20\) by its path, but the record says .*'res', 3\)"):
        load(Release(**fields, layer=3, neuronpedia=None), local_dir=tmp_path)
    with pytest.raises(KeyError, match="no repository 'me/mine'"):
        load(Release(**fields | {"repo": "me/mine"}, layer=20, neuronpedia=None))
    with pytest.raises(ValueError, match="revision='main' has no meaning with local_dir"):
        load(from_path(REPO, PATH), local_dir=tmp_path, revision="main")


def test_a_record_made_by_hand_may_leave_the_organisation_out(tmp_path):
    write(tmp_path / PATH, arrays(2304, 6))
    whole = from_path(REPO, PATH)
    short = dataclasses.replace(whole, repo="gemma-scope-2b-pt-res", model="gemma-2-2b")
    assert load(short, local_dir=tmp_path).cfg == load(whole, local_dir=tmp_path).cfg


@pytest.mark.parametrize(
    "place",
    ["layer_3/width_16k/average_l0_71", "layer_20/width_65k/average_l0_71", "layer_20/width_16k/average_l0_38",
     "gemma-scope-2b-pt-mlp/" + PATH],
)  # fmt: skip
def test_a_single_file_that_is_another_by_its_own_path_is_refused(tmp_path, place):
    file = write(tmp_path / place, arrays(2304, 6))
    for folder in (file.parent, file):
        with pytest.raises(ValueError, match="is another dictionary by its own path than"):
            load(from_path(REPO, PATH), local_dir=folder)


# ---- device and dtype ----


@pytest.mark.parametrize("device", ["foo", "cuda:99", "xla"])
def test_a_device_that_is_not_there_is_refused(tmp_path, device):
    with pytest.raises(ValueError, match=rf"device='{device}' cannot be used here .*Use 'cpu'"):
        read(write(tmp_path, arrays()), device=device)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool])
def test_a_dtype_that_is_none_for_weights_is_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match=rf"dtype={dtype} is no dtype for weights; use one of torch.float32"):
        read(write(tmp_path, arrays()), dtype=dtype)


@pytest.mark.parametrize(("name", "scale"), [("W_enc", 1.0), ("W_dec", 1.0), ("b_enc", 1.0), ("b_dec", 1e5)])
def test_numbers_too_large_for_the_dtype_are_not_called_damaged(tmp_path, name, scale):
    content = arrays()
    if scale == 1.0:
        content[name].flat[7] = -1e5
    file = write(tmp_path, content)
    named = name if scale == 1.0 else "b_enc"
    with pytest.raises(ValueError, match=f"{named} holds finite numbers that torch.float16 cannot"):
        read(file, dtype=torch.float16, scale=scale)
    assert read(file, dtype=torch.bfloat16, scale=scale).W_enc.dtype == torch.bfloat16


# ---- suites of one's own ----


def test_a_suite_in_gemma_scopes_layout_is_listed_and_loaded(tmp_path):
    for site, d_in in (("transcoder", 12), ("res", 12), ("att", 16), ("mlp", 12)):
        for layer in (0, 10, 2):
            write(tmp_path / site / f"layer_{layer}" / "width_1k" / "average_l0_20", arrays(d_in, 24))
    suite = open_suite(tmp_path, model="me/tiny")
    assert [release.site for release in suite] == ["res"] * 3 + ["mlp"] * 3 + ["att"] * 3 + ["transcoder"] * 3
    assert [release.layer for release in suite] == [0, 2, 10] * 4
    assert {(release.repo, release.model, release.width, release.l0) for release in suite} == {("", "me/tiny", 24, 20)}
    saes = [load(release, local_dir=tmp_path) for release in suite]
    assert saes[7].cfg.hook_in == saes[7].cfg.hook_out == "blocks.2.attn.hook_z"
    assert saes[-1].cfg.hook_in == "blocks.10.ln2.hook_normalized"
    assert saes[-1].cfg.hook_out == "blocks.10.hook_mlp_out"
    assert saes[-1].cfg.path == "transcoder/layer_10/width_1k/average_l0_20"
    assert saes[-1].cfg.model == "me/tiny"
    assert [r.path for r in open_suite(tmp_path / "res")] == [f"layer_{i}/width_1k/average_l0_20" for i in (0, 2, 10)]
    with pytest.raises(ValueError, match="pass local_dir= with the folder given to open_suite"):
        load(suite[0])


def test_a_mirror_opens_as_the_releases_it_holds(tmp_path):
    write(tmp_path / "gemma-scope-2b-pt-res" / PATH, arrays(2304, 6))
    write(tmp_path / "google" / "gemma-scope-9b-it-res" / "layer_9/width_16k/average_l0_88", arrays(3584, 6))
    suite = open_suite(tmp_path)
    assert suite == [from_path("gemma-scope-9b-it-res", "layer_9/width_16k/average_l0_88"), from_path(REPO, PATH)]
    assert [load(release, local_dir=tmp_path).cfg.d_in for release in suite] == [3584, 2304]


def test_a_suite_whose_site_no_folder_names_needs_it_said(tmp_path):
    write(tmp_path / "layer_1" / "width_1k" / "average_l0_9", arrays())
    with pytest.raises(ValueError, match=r"is no site .* pass site="):
        open_suite(tmp_path)
    assert [release.site for release in open_suite(tmp_path, site="mlp")] == ["mlp"]


def test_what_is_no_suite_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no params.npz; expected <site>/layer_<L>"):
        open_suite(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        open_suite(tmp_path / "nowhere")
    write(tmp_path / "res" / "layer_1", arrays())
    with pytest.raises(ValueError, match=r"does not follow .* read_npz"):
        open_suite(tmp_path)
    write(tmp_path / "s" / "embedding" / "width_1k" / "average_l0_9", arrays())
    release = open_suite(tmp_path / "s")[0]
    with pytest.raises(ValueError, match=r"sqrt\(d_model\) of its model; use read_npz with scale="):
        load(release, local_dir=tmp_path / "s")


# ---- wrong files ----


def _without(name):
    return lambda content: content.pop(name)


def _replace(name, change):
    return lambda content: content.update({name: change(content[name])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("threshold"), "expected the arrays W_enc, b_enc, W_dec, b_dec, threshold, found W_dec, W_enc, b_dec"),
        (lambda c: c.update(extra=c["b_dec"]), "found .*extra"),
        (lambda c: c.update(w_enc=c.pop("W_enc")), "found .*w_enc"),
        (_replace("W_enc", lambda a: a.T), r"do not fit together; .* found W_enc \(20, 12\)"),
        (_replace("threshold", lambda a: a[:-1]), r"do not fit together; .*threshold \(19,\)"),
        (_replace("b_enc", lambda a: a[None]), r"b_enc \(1, 20\)"),
        (_replace("b_dec", lambda a: a[:0]), r"b_dec \(0,\)"),
        (_replace("W_dec", lambda a: a[0]), "must have two axes"),
        (_replace("b_dec", lambda a: a.astype("int32")), "b_dec has dtype int32, expected float32"),
        (_replace("b_dec", lambda a: a.astype(">f4")), "b_dec has dtype >f4, expected float32"),
        (_replace("b_dec", lambda a: a.astype(object)), "b_dec holds pickled objects, which are never loaded"),
        (_replace("W_enc", lambda a: np.where(a == a.max(), np.nan, a)), "W_enc holds numbers that are not finite"),
        (_replace("b_enc", lambda a: np.where(a == a.max(), np.inf, a)), "b_enc holds numbers that are not finite"),
        (_replace("threshold", lambda a: np.where(a == a.max(), -np.inf, a)), "threshold holds numbers that are not"),
    ],
)  # fmt: skip
def test_wrong_arrays_are_refused_by_name(tmp_path, change, message):
    content = arrays()
    change(content)
    file = write(tmp_path, content)
    with pytest.raises(ValueError, match=message) as error:
        read(file)
    assert str(file) in str(error.value)


def test_activations_of_another_width_are_refused(tmp_path):
    write(tmp_path, arrays(2048, 6))
    with pytest.raises(ValueError, match="are 2304 wide, but the file reads d_in=2048 and writes d_out=2048"):
        load(from_path(REPO, PATH), local_dir=tmp_path)


def test_a_transcoder_is_no_autoencoder(tmp_path):
    file = write(tmp_path, arrays(12, 20, 16))
    with pytest.raises(ValueError, match="reads d_in=12 and writes d_out=16, so it is a transcoder") as error:
        read(file)
    assert str(file) in str(error.value)
    sae = read_npz(file, hook_in="blocks.0.ln2.hook_normalized", hook_out="blocks.0.hook_mlp_out")
    assert sae(torch.zeros(3, 12)).shape == (3, 16)


def _pickle_bytes() -> bytes:
    return pickle.dumps({name: array.tolist() for name, array in arrays().items()})


def _npy_bytes() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return stream.getvalue()


def _torch_bytes() -> bytes:
    stream = io.BytesIO()
    torch.save({"W_enc": torch.zeros(3)}, stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "but it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "it is a Git LFS pointer"),
        (_pickle_bytes(), "it is a pickle, which is never loaded"),
        (_npy_bytes(), "it is a single npy array"),
        (b"<!doctype html><title>404</title>", "it is no zip archive and begins with b'<!doctyp'"),
        (_torch_bytes(), "expected the arrays W_enc, .* found .*data.pkl"),
    ],
)
def test_a_foreign_file_is_refused_with_what_it_looks_like(tmp_path, content, message):
    file = tmp_path / "params.npz"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_cut_or_changed_anywhere_is_refused(tmp_path, save):
    """Every cut is refused; a changed byte is refused unless it carries no meaning, and never changes a weight."""
    whole = write(tmp_path, arrays(), save=save).read_bytes()
    good = {name: tensor.clone() for name, tensor in read(tmp_path).state_dict().items()}
    file = tmp_path / "params.npz"
    for length in range(0, len(whole), 53):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"is empty|truncated or damaged|no zip archive") as error:
            read(file)
        assert str(file) in str(error.value)
    refused = 0
    for position in range(0, len(whole), 13):
        changed = bytearray(whole)
        changed[position] ^= 0x41
        file.write_bytes(changed)
        try:
            state = read(file).state_dict()
        except ValueError:
            refused += 1
        else:
            assert all(torch.equal(state[name], good[name]) for name in good)
    assert refused > 0.7 * len(whole) / 13


def test_a_header_that_contradicts_the_archive_is_refused_before_allocating(tmp_path):
    """An array that claims 4 EB must not be believed."""
    file = write(tmp_path, arrays())
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    claimed = members["W_enc.npy"].replace(b"(12, 20)", b"(999999999999, 20)".ljust(8))
    header = len(claimed) - len(members["W_enc.npy"])
    members["W_enc.npy"] = claimed.replace(b" " * header + b"\n", b"\n", 1)
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"W_enc of shape \(999999999999, 20\) needs .* bytes, the archive holds 960"):
        read(file)


def test_a_renamed_or_missing_file_is_named(tmp_path):
    write(tmp_path, arrays()).rename(tmp_path / "params(1).npz")
    with pytest.raises(FileNotFoundError, match=r"holds no params.npz; it holds params\(1\).npz. Was the file renamed"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"does not exist; expected a params.npz or the folder"):
        read(tmp_path / "params.npz")
    assert read(tmp_path / "params(1).npz").cfg.d_sae == 20
