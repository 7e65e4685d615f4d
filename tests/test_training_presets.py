"""The presets: their numbers against the table with sources, and that every one of them trains."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import torch

from scope_lens.sae import HookedSAE
from scope_lens.training import TrainConfig
from scope_lens.training.learner import Learner

PAGE = Path(__file__).parents[1] / "docs" / "pages" / "training_recipe.md"
CHOSEN = {"hook_in", "hook_out", "width", "seed"}  # by the caller
RES = {"site": "res", "layer": 1, "width": "16k"}
PRESETS = {
    "gemma_scope": TrainConfig.gemma_scope(**RES, sparsity=6e-4),
    "gemma_scope_it": TrainConfig.gemma_scope_it(**RES, sparsity=6e-4),
    "gemma_scope_2": TrainConfig.gemma_scope_2(**RES, target_l0=60),
    "short_run": TrainConfig.short_run(**RES),
    "short_run topk": TrainConfig.short_run(**RES, activation="topk", k=32),
    "short_run batchtopk": TrainConfig.short_run(**RES, activation="batchtopk", k=32),
    "short_run relu": TrainConfig.short_run(**RES, activation="relu"),
    "short_run gated": TrainConfig.short_run(**RES, activation="gated"),
}
SMALL = {"site": "res", "layer": 1, "width": 64}
RUNS = {
    "gemma_scope": TrainConfig.gemma_scope(**SMALL, sparsity=6e-4),
    "gemma_scope transcoder": TrainConfig.gemma_scope(**SMALL | {"site": "transcoder"}, sparsity=6e-4),
    "gemma_scope_it": TrainConfig.gemma_scope_it(**SMALL, sparsity=6e-4),
    "gemma_scope_2": TrainConfig.gemma_scope_2(**SMALL, target_l0=5),
    "gemma_scope_2 transcoder": TrainConfig.gemma_scope_2(**SMALL | {"site": "transcoder"}, target_l0=5),
    "short_run": TrainConfig.short_run(**SMALL),
    "short_run target": TrainConfig.short_run(**SMALL, target_l0=5),
    "short_run transcoder": TrainConfig.short_run(**SMALL | {"site": "transcoder"}),
    "short_run topk": TrainConfig.short_run(**SMALL, activation="topk", k=5),
    "short_run batchtopk": TrainConfig.short_run(**SMALL, activation="batchtopk", k=5),
    "short_run relu": TrainConfig.short_run(**SMALL, activation="relu"),
    "short_run gated": TrainConfig.short_run(**SMALL, activation="gated"),
}


def number(value):
    """A literal, or a product of powers of numbers."""
    if re.fullmatch(r"[\d.e*/-]+", value):
        return eval(value)  # noqa: S307
    return ast.literal_eval(value)


def table():
    """preset -> {setting: (value, source)} as the page lists them."""
    rows = re.findall(r"^\| `([^`]+)` \| `(\w+)` \| `([^`]+)` \| ([^|]+) \|", PAGE.read_text(), re.MULTILINE)
    listed = {}
    for preset, setting, value, source in rows:
        assert setting not in listed.setdefault(preset, {}), f"{preset}.{setting} is listed twice"
        listed[preset][setting] = (number(value), source.strip())
    return listed


def test_every_setting_of_every_preset_is_in_the_table_with_its_source():
    listed = table()
    assert listed.keys() == PRESETS.keys()
    names = {field.name for field in dataclasses.fields(TrainConfig)} - CHOSEN
    published = listed["gemma_scope"]
    assert published.keys() == names - {"sparsity"}  # which is the caller's
    for preset, cfg in PRESETS.items():
        own = listed[preset]
        for name in names - ({"sparsity"} if preset in ("gemma_scope", "gemma_scope_it") else set()):
            value, source = own[name] if name in own else published[name]  # what is not listed is Gemma Scope's
            assert getattr(cfg, name) == value, (preset, name)
            assert source


def test_sources_name_a_paper_and_a_section_or_say_ours():
    paper = r"(arXiv \d{4}\.\d{5}|GS2|GDM update 2025-03)(, (section|appendix) [\dA-Z.]+|, Eq\. \d+)?"
    kinds = re.compile(rf"{paper}|ours|off|the caller's")
    for preset, settings in table().items():
        for name, (_, source) in settings.items():
            assert kinds.match(source), (preset, name, source)
    printed = {name for name, (_, source) in table()["gemma_scope"].items() if source.startswith("arXiv")}
    assert {"learning_rate", "lr_warmup", "sparsity_warmup", "betas", "adam_eps", "batch_size", "bandwidth"} <= printed
    assert {"threshold_init", "steps", "untrained"} <= printed


def test_tokens_follow_the_width():
    steps = {
        w: TrainConfig.gemma_scope(site="res", layer=0, width=w, sparsity=1e-3).steps for w in ("16k", "131k", "1m")
    }
    assert [round(4096 * n / 1e9, 3) for n in steps.values()] == [4, 8, 16]


def test_hooks_and_skip_of_the_sites():
    for preset in (TrainConfig.gemma_scope, TrainConfig.gemma_scope_it):
        cfg = preset(site="transcoder", layer=3, width=64, sparsity=1e-3)
        assert (cfg.hook_in, cfg.hook_out, cfg.skip) == ("blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out", False)
    gained = TrainConfig.gemma_scope_2(site="transcoder", layer=3, width=64, target_l0=20)
    assert (gained.hook_in, gained.hook_out, gained.skip) == ("blocks.3.ln2.hook_out", "blocks.3.hook_mlp_out", True)
    assert not TrainConfig.gemma_scope_2(site="transcoder", layer=3, width=64, target_l0=20, skip=False).skip
    for site, hook in (("res", "hook_resid_post"), ("mlp", "hook_mlp_out"), ("att", "attn.hook_z")):
        cfg = TrainConfig.gemma_scope_2(site=site, layer=3, width=64, target_l0=20)
        assert (cfg.hook_in, cfg.hook_out, cfg.skip) == (f"blocks.3.{hook}", f"blocks.3.{hook}", False)
    with pytest.raises(ValueError, match="would learn the identity"):
        TrainConfig.gemma_scope_2(site="res", layer=3, width=64, target_l0=20, skip=True)


def test_the_chat_prefix_is_untrained_in_the_dictionary_too():
    learner = Learner(RUNS["gemma_scope_it"], d_in=8, d_out=8, scale=1.0, model="m")
    assert learner.result().cfg.untrained == ("bos", "eos", "pad", "chat_prefix")


@pytest.mark.parametrize("name", RUNS)
def test_every_preset_trains(name):
    """Real updates, and a squared error that falls; every parameter moves."""
    cfg = RUNS[name]
    transcoder = cfg.hook_in != cfg.hook_out
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 16, generator=generator)
    x = torch.randn(1024, 8, generator=generator).relu() @ mixing
    y = x.tanh() if transcoder else x
    learner = Learner(cfg, d_in=16, d_out=16, scale=float(x.pow(2).sum(1).mean().sqrt()), model="m")
    before = {name: value.detach().clone() for name, value in learner.parameters.items()}
    errors = [learner.update(x, y).squared_error.item() for _ in range(60)]
    assert errors[-1] < 0.985 * errors[0]
    for parameter, value in learner.parameters.items():
        assert not torch.equal(value, before[parameter]), parameter
    sae = learner.result()
    assert isinstance(sae, HookedSAE)
    assert sae.cfg.hook_in == cfg.hook_in
    assert (sae.W_skip is not None) == cfg.skip
    assert sae(x).isfinite().all()


def test_a_log_threshold_that_cannot_move_is_told():
    published = TrainConfig.gemma_scope(**SMALL, sparsity=1e-3)
    assert published.threshold_warning() is None
    assert published.warm_up_warning() is None
    short = dataclasses.replace(published, steps=12_000)
    message = short.threshold_warning()
    # 12,000 updates at 7e-5, the first 1,000 of them at 55 % of it on average: 0.81. sqrt(0.001) is 0.032.
    assert "12000 updates at learning rate 7e-05 change log(threshold) by 0.81 at most" in message
    assert "within a factor of 2.24 of 0.001, and this sparsity needs them near 0.032" in message
    assert "set threshold='direct', start them nearer (threshold_init), or use TrainConfig.short_run" in message
    assert dataclasses.replace(short, threshold_init=0.02).threshold_warning() is None
    assert "needs them near 0.05" in dataclasses.replace(short, target_l0=5.0).threshold_warning()
    assert sum(short.learning_rate_at(step) for step in range(12_000)) == pytest.approx(0.81, abs=5e-3)
    assert dataclasses.replace(short, threshold="direct").threshold_warning() is None
    assert TrainConfig.short_run(**SMALL, steps=10).threshold_warning() is None
    assert TrainConfig.short_run(**SMALL, activation="topk", k=3).threshold_warning() is None


def test_the_bound_of_the_warning_holds():
    """No gradient moves log(threshold) further than the sum of the learning rates."""
    cfg = TrainConfig.gemma_scope(**SMALL, sparsity=1e-3)
    learner = Learner(dataclasses.replace(cfg, steps=400, lr_warmup=100), d_in=8, d_out=8, scale=1.0, model="m")
    start = learner.objective.theta.detach().clone()
    for _ in range(100):
        x = torch.randn(64, 8)
        learner.update(x, x)
    moved = (learner.objective.theta - start).abs().max().item()
    allowed = sum(learner.cfg.learning_rate_at(step) for step in range(100))
    assert 0 < moved < 2 * allowed


def test_a_run_that_ends_in_its_warm_up_is_told():
    cfg = dataclasses.replace(TrainConfig.gemma_scope(**SMALL, sparsity=1e-3), steps=9_000)
    assert "9000 updates, and its warm-ups last 1000 (learning rate) and 10000 (sparsity)" in cfg.warm_up_warning()
    assert dataclasses.replace(cfg, steps=10_001).warm_up_warning() is None
