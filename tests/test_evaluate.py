"""The numbers of `evaluate` against Hugging Face in float64, plain torch hooks and loops over single tokens."""

import copy
import math
from contextlib import ExitStack

import pytest
import torch
from hf_reference import SITES, encode_decode, replaced, width

from scope_lens.evaluation import evaluate
from scope_lens.evaluation.predictions import compare, cross_entropy
from scope_lens.evaluation.site_sums import SiteSums
from scope_lens.model import ScopeModel

PAD, EOS, BOS = 0, 1, 2  # of every model here but Llama, whose BOS is 1 and EOS 2, and which has no PAD


def special_rows() -> torch.Tensor:
    """(6, 12): plain, with a second document, padded, with EOS, nearly all padding, nothing but padding."""
    ids = torch.randint(3, 199, (6, 12))
    ids[:, 0] = BOS
    ids[1, 5:7] = torch.tensor([EOS, BOS])
    ids[2, 8:] = PAD
    ids[3, 4] = EOS
    ids[4, 2:] = PAD
    ids[5, :] = PAD
    return ids


@torch.no_grad()
def reference(hf, sites, saes, tokens, *, positions="trained", ablation="mean"):
    """Every number of an EvalResult, one token at a time, in float64."""
    model = copy.deepcopy(hf).double()
    saes = [copy.deepcopy(sae).double() for sae in saes]
    special = {kind: getattr(hf.config, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    untrained = [{special[kind] for kind in sae.cfg.untrained} for sae in saes]
    never = set().union(*untrained)

    def run(row, changes):
        with ExitStack() as stack:
            for site, ids, change in zip(sites, untrained, changes, strict=True):

                def at_site(x, y, ids=ids, change=change):
                    new = change(x, y).clone()
                    for t, token in enumerate(row.tolist()):
                        if positions == "trained" and token in ids:
                            new[0, t] = y[0, t]
                    return new

                stack.enter_context(replaced(model, site, at_site))
            return model(row[None]).logits[0]

    counted_x = [[] for _ in saes]
    counted_y = [[] for _ in saes]

    def watch(index, row):
        def change(x, y):
            for t, token in enumerate(row.tolist()):
                if token not in never:
                    counted_x[index].append(x[0, t])
                    counted_y[index].append(y[0, t])
            return y

        return change

    clean = [run(row, [watch(i, row) for i in range(len(saes))]) for row in tokens]
    means = [torch.stack(ys).mean(0) for ys in counted_y]
    spliced_in = [lambda x, y, sae=sae: encode_decode(sae, x)[1] for sae in saes]
    spliced_out = [lambda x, y, sae=sae: y - encode_decode(sae, x)[0] @ sae.W_dec for sae in saes]
    ablated = [
        lambda x, y, mean=mean: torch.zeros_like(y) if ablation == "zero" else mean.expand_as(y) for mean in means
    ]
    runs = {"clean": clean} | {
        name: [run(row, changes) for row in tokens]
        for name, changes in (("spliced", spliced_in), ("out", spliced_out), ("ablated", ablated))
    }

    total = dict.fromkeys((*runs, "kl"), 0.0)
    differences, n, masked = [], 0, 0
    for s, row in enumerate(tokens.tolist()):
        per_sequence = []
        for t in range(len(row) - 1):
            if row[t] in never or row[t + 1] in (special["bos"], special["pad"]):
                masked += 1
                continue
            log_p = {name: logits[s][t] - torch.logsumexp(logits[s][t], 0) for name, logits in runs.items()}
            for name in runs:
                total[name] -= float(log_p[name][row[t + 1]])
            total["kl"] += sum(
                math.exp(p) * (p - q) for p, q in zip(log_p["clean"].tolist(), log_p["spliced"].tolist(), strict=True)
            )
            per_sequence.append(float(log_p["clean"][row[t + 1]] - log_p["spliced"][row[t + 1]]))
        n += len(per_sequence)
        if per_sequence:
            differences.append(per_sequence)
    ce = {name: value / n for name, value in total.items()}
    delta = ce["spliced"] - ce["clean"]
    clusters = len(differences)
    spread = sum(sum(d - delta for d in cluster) ** 2 for cluster in differences)
    by_site = {"fvu": {}, "l0": {}, "dead": {}}
    for sae, xs, ys, mean in zip(saes, counted_x, counted_y, means, strict=True):
        error = variance = active = 0.0
        fired = set()
        for x, y in zip(xs, ys, strict=True):
            latents, recons = encode_decode(sae, x)
            error += float((y - recons).square().sum())
            variance += float((y - mean).square().sum())
            active += int((latents != 0).sum())
            fired |= set(latents.nonzero()[:, 0].tolist())
        by_site["fvu"][sae.cfg.hook_out] = error / variance
        by_site["l0"][sae.cfg.hook_out] = active / len(ys)
        by_site["dead"][sae.cfg.hook_out] = 1 - len(fired) / sae.cfg.d_sae
    return by_site | {
        "ce_clean": ce["clean"],
        "ce_spliced": ce["spliced"],
        "ce_spliced_out": ce["out"],
        "ce_ablated": ce["ablated"],
        "delta_loss": delta,
        "delta_loss_se": math.sqrt(clusters / (clusters - 1) * spread) / n,
        "delta_loss_out": ce["out"] - ce["clean"],
        "loss_recovered": (ce["ablated"] - ce["spliced"]) / (ce["ablated"] - ce["clean"]),
        "kl": ce["kl"],
        "n_tokens": n,
        "n_masked": masked,
    }


def assert_agrees(got, want, rel=1e-5):
    for name, value in want.items():
        # Losses of a few nats are subtracted: the floor of what is left is float32's rounding of them.
        floor = rel / 5
        if name == "loss_recovered":
            floor *= (1 + abs(value)) / abs(want["ce_ablated"] - want["ce_clean"])
        assert getattr(got, name) == pytest.approx(value, rel=rel, abs=floor), name


def build(hf_model, random_sae, architecture, names, *, dtype=torch.float32, **fields):
    hf = hf_model(architecture)
    sites = [SITES[architecture][name] for name in names]
    saes = [
        random_sae(site.hook_in, site.hook_out, d_in=width(hf, name), **fields).to(dtype)
        for name, site in zip(names, sites, strict=True)
    ]
    return hf, ScopeModel.from_hf(copy.deepcopy(hf).to(dtype)), sites, saes


@pytest.mark.parametrize(
    ("site", "ablation", "positions"),
    [
        ("res", "mean", "trained"),
        ("res", "zero", "trained"),
        ("res", "mean", "all"),
        ("att", "zero", "all"),
        ("mlp", "mean", "trained"),
        ("transcoder", "mean", "trained"),
        ("transcoder", "zero", "all"),
        ("res canonical", "mean", "trained"),  # one site, spelled in two ways
        ("embedding", "mean", "trained"),
    ],
)
def test_gemma_at_every_site(hf_model, random_sae, site, ablation, positions):
    hf, model, sites, saes = build(hf_model, random_sae, "gemma2", [site], dtype=torch.float64)
    tokens = special_rows()
    got = evaluate(model, tokens, saes=saes[0], batch_size=4, positions=positions, ablation=ablation, progress=False)
    want = reference(hf, sites, saes, tokens, positions=positions, ablation=ablation)
    assert abs(want["delta_loss"]) > 1e-4
    assert abs(want["delta_loss_out"]) > 1e-4
    assert_agrees(got, want, rel=1e-6)


@pytest.mark.parametrize(
    ("architecture", "site"), [("gemma3", "gained transcoder"), ("gpt2", "transcoder"), ("llama", "att")]
)
def test_other_architectures(hf_model, random_sae, architecture, site):
    hf, model, sites, saes = build(hf_model, random_sae, architecture, [site], skip="transcoder" in site)
    tokens = special_rows()
    if architecture == "llama":
        tokens = torch.randint(3, 199, (4, 9))
        tokens[:, 0] = 1
    assert_agrees(evaluate(model, tokens, saes=saes, progress=False), reference(hf, sites, saes, tokens))


def test_several_dictionaries_are_spliced_together_and_count_where_all_were_trained(hf_model, random_sae):
    hf, model, sites, saes = build(hf_model, random_sae, "gemma2", ["att", "transcoder", "res"])
    saes[1] = random_sae(sites[1].hook_in, sites[1].hook_out, d_in=48, skip=True, untrained=("bos",))
    tokens = special_rows()
    got = evaluate(model, tokens, saes=saes, batch_size=5, progress=False)
    assert list(got.fvu) == [sae.cfg.hook_out for sae in saes]
    assert_agrees(got, reference(hf, sites, saes, tokens))


def test_a_dictionary_trained_everywhere_counts_everywhere_but_predictions_of_bos_and_pad(hf_model, random_sae):
    hf, model, sites, saes = build(hf_model, random_sae, "gemma2", ["mlp"], untrained=())
    tokens = special_rows()[:5]
    got = evaluate(model, tokens, saes=saes, progress=False)
    assert_agrees(got, reference(hf, sites, saes, tokens))
    assert got.n_masked == int(torch.isin(tokens[:, 1:], torch.tensor([BOS, PAD])).sum())


def test_batch_size_and_grouping_change_nothing(gemma2, random_sae):
    model, _ = gemma2
    sae = random_sae("blocks.1.hook_resid_post", d_in=48)
    tokens = special_rows()
    results = [
        evaluate(model, given, saes=sae, batch_size=size, progress=False)
        for given, size in ((tokens, 1), (tokens, 4), (tokens, 100), ((row[None] for row in tokens), 3))
    ]
    same = ["ce_clean", "ce_spliced", "ce_spliced_out", "ce_ablated", "delta_loss_se", "kl", "fvu", "l0", "dead"]
    for other in results[1:]:
        assert_agrees(other, {name: getattr(results[0], name) for name in same})
        assert other.tokens_hash == results[0].tokens_hash


def test_rows_of_different_length(hf_model, random_sae):
    hf, model, sites, saes = build(hf_model, random_sae, "gemma2", ["res"])
    long, short = special_rows()[:3], special_rows()[:2, :7]
    padded = torch.cat([long, torch.nn.functional.pad(short, (0, 5), value=PAD)])
    got = evaluate(model, [long, short], saes=saes, progress=False)
    want = reference(hf, sites, saes, padded)
    assert_agrees(got, {name: value for name, value in want.items() if name != "n_masked"})


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2"])
def test_padding_on_the_left_changes_nothing(hf_model, random_sae, architecture):
    _, model, _, saes = build(hf_model, random_sae, architecture, ["res"])
    tokens = special_rows()[:2]
    padded = torch.nn.functional.pad(tokens, (3, 0), value=PAD)
    padded[1] = torch.nn.functional.pad(tokens[1], (0, 3), value=PAD)
    want = evaluate(model, tokens, saes=saes, progress=False)
    got = evaluate(model, padded, saes=saes, progress=False)
    for name in ("ce_clean", "ce_spliced", "ce_spliced_out", "ce_ablated", "kl", "fvu", "l0", "n_tokens"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-5), name


def test_four_forwards_a_batch_and_three_encodings(gemma2, random_sae, monkeypatch):
    model, _ = gemma2
    sae = random_sae("blocks.1.hook_resid_post", d_in=48)
    calls = {"forward": 0, "encode": 0}
    real = type(sae).pre_activation

    def encode(self, x):
        calls["encode"] += 1
        return real(self, x)

    def count(tensor, hook):
        calls["forward"] += 1

    monkeypatch.setattr(type(sae), "pre_activation", encode)
    model.add_hook("hook_embed", count)
    evaluate(model, special_rows(), saes=sae, batch_size=2, progress=False)
    assert calls == {"forward": 4 * 3, "encode": 3 * 3}  # clean, in and out encode; the ablation does not


def test_bfloat16_model_with_float32_dictionary(hf_model, random_sae):
    hf, _, sites, saes = build(hf_model, random_sae, "gemma2", ["transcoder"])
    model = ScopeModel.from_hf(copy.deepcopy(hf).to(torch.bfloat16))
    tokens = special_rows()
    got = evaluate(model, tokens, saes=saes, progress=False)
    want = reference(copy.deepcopy(hf).to(torch.bfloat16).float(), sites, saes, tokens)
    assert got.settings["dtype"] == "bfloat16"
    assert_agrees(got, {name: want[name] for name in ("ce_clean", "ce_spliced", "fvu", "l0")}, rel=0.03)


def test_a_splice_that_changes_nothing_recovers_everything(gemma2, random_sae):
    model, _ = gemma2
    sae = random_sae("blocks.1.hook_mlp_out", d_in=48, d_sae=96, activation="relu")
    with torch.no_grad():  # latents are the positive and the negative part of every coordinate
        sae.W_enc.copy_(torch.cat([torch.eye(48), -torch.eye(48)], dim=1))
        sae.W_dec.copy_(sae.W_enc.T)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    got = evaluate(model, special_rows(), saes=sae, ablation="zero", progress=False)
    assert got.delta_loss == 0
    assert got.delta_loss_se == 0
    assert got.loss_recovered == 1
    assert got.kl == 0
    assert got.fvu == {"blocks.1.hook_mlp_out": 0}
    assert got.l0 == {"blocks.1.hook_mlp_out": 48}
    # Splice-out leaves nothing of y, so it is the zero ablation.
    assert got.ce_spliced_out == pytest.approx(got.ce_ablated, rel=1e-6)


def test_an_ablation_that_changes_nothing_has_no_loss_recovered(gemma2, random_sae):
    model, _ = gemma2
    silent = random_sae("blocks.1.hook_mlp_out", d_in=48)
    model.add_hook("blocks.1.hook_mlp_out", lambda tensor, hook: torch.zeros_like(tensor))
    got = evaluate(model, special_rows(), saes=silent, ablation="zero", progress=False)
    assert math.isnan(got.loss_recovered)
    assert got.fvu == {"blocks.1.hook_mlp_out": math.inf}, "a site without variance, missed"
    with torch.no_grad():
        silent.b_dec.zero_()
        silent.b_enc.fill_(-1)
    got = evaluate(model, special_rows(), saes=silent, ablation="zero", progress=False)
    assert math.isnan(got.fvu["blocks.1.hook_mlp_out"]), "a site without variance, met"
    assert got.dead == {"blocks.1.hook_mlp_out": 1}
    assert got.l0 == {"blocks.1.hook_mlp_out": 0}


def test_user_hooks_on_the_model_stay_in_force(hf_model, random_sae):
    hf, model, sites, saes = build(hf_model, random_sae, "gemma2", ["res"])
    with torch.no_grad():
        hf.model.layers[0].mlp.down_proj.weight.zero_()  # the norm after it keeps zero zero
    model.add_hook("blocks.0.hook_mlp_out", lambda tensor, hook: torch.zeros_like(tensor))
    tokens = special_rows()
    assert_agrees(evaluate(model, tokens, saes=saes, progress=False), reference(hf, sites, saes, tokens))


def test_predictions_in_blocks_equal_float64(monkeypatch):
    monkeypatch.setattr("scope_lens.evaluation.predictions._BLOCK", 3 * 50)  # three positions a block, unevenly
    clean, other = 4 * torch.randn(2, 5, 50), 4 * torch.randn(2, 5, 50)
    tokens = torch.randint(0, 50, (2, 5))
    log_p, log_q = clean.double().log_softmax(-1), other.double().log_softmax(-1)
    ce_clean, ce_other, kl = compare(clean, other, tokens)
    for got, log in ((ce_clean, log_p), (ce_other, log_q), (cross_entropy(clean, tokens), log_p)):
        want = -log[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
        torch.testing.assert_close(got[:, :-1].double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kl.double(), (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-5, atol=1e-6)


def test_variance_is_centred_where_the_mean_is_large(random_sae):
    sae = random_sae("blocks.0.hook_resid_post", d_in=48)
    y = 1000 + torch.randn(400, 48)
    parts = [SiteSums.of(sae, part, part) for part in y.split([1, 0, 130, 269])]
    sums = parts[0] + parts[1] + parts[2] + parts[3]
    want = (y.double() - y.double().mean(0)).square().sum()
    assert float(sums.centred) == pytest.approx(float(want), rel=1e-9)
    torch.testing.assert_close(sums.mean, y.double().mean(0), rtol=1e-12, atol=0)
