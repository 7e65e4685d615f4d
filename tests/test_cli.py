"""The command line: what each verb prints and writes, and how it ends."""

import json
import subprocess
import sys
import time

import pytest
import torch

from scope_lens import cli, demo, evaluate
from scope_lens.evaluation import each
from scope_lens.evaluation.each import read_results
from scope_lens.releases import find, from_path, hooks_for, loaders
from scope_lens.training import save_gemma_scope

MODEL = str(demo.path() / "model")
RES = "res/layer_1/width_1k/average_l0_9"
TRANSCODER = "transcoder/layer_2/width_1k/average_l0_8"


@pytest.fixture
def suite(tmp_path, random_sae):
    """Two random dictionaries for the embedded model, in Gemma Scope's layout."""
    folder = tmp_path / "suite"
    for path, site, layer in ((RES, "res", 1), (TRANSCODER, "transcoder", 2)):
        save_gemma_scope(random_sae(*hooks_for(site, layer), d_in=192, d_sae=64), folder / path)
    return folder


@pytest.fixture
def text(tmp_path):
    """A file of two documents."""
    file = tmp_path / "stories.txt"
    file.write_text("\n<|endoftext|>\n".join(story[:300] for story in demo.text()[:2]))
    return file


@pytest.fixture
def run(capsys):
    """Run the command line; returns the exit code, standard output and the errors without progress bars."""

    def words(*argv):
        capsys.readouterr()
        code = cli.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return code, out, [line for line in err.splitlines() if line.startswith("scope-lens: ")]

    return words


# ---- help ----


def test_help_names_every_verb_and_is_quick():
    start = time.perf_counter()
    program = "from scope_lens.cli import main; main(['--help'])"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert time.perf_counter() - start < 5
    assert all(f"• {verb} " in shown for verb in ("demo", "list", "info", "evaluate", "harvest", "train"))


def test_a_wrong_verb_ends_with_two(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["evalute"])
    assert ended.value.code == 2
    assert "evaluate" in capsys.readouterr().err


# ---- demo ----


def test_demo_measures_every_embedded_dictionary_and_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.fidelity, "_DEMO_DOCUMENTS", 1)
    code, out, errors = run("demo")
    header, *rows = (line.split() for line in out.partition("\n\n")[0].splitlines())
    assert (code, errors) == (0, [])
    assert " ".join(header) == "site layer width L0 FVU delta loss std. error splice-out recovered dictionary"
    assert [(site, int(layer)) for site, layer, *_ in rows] == [
        (site, layer) for site in ("res", "mlp", "att", "transcoder") for layer in range(4)
    ]
    for site, _, width, _, fvu, delta_loss, _, splice_out, _, path in rows:
        assert width == "1k"
        assert path.startswith(f"{site}/layer_")
        assert 0 < float(fvu) < 0.5
        assert float(delta_loss) < float(splice_out)
    assert not list(tmp_path.iterdir())


# ---- list and info ----


def test_list_prints_what_find_finds(run):
    code, out, errors = run("list", "--model", "gemma-2-2b", "--site", "res", "--layer", 12, "--width", "16k")
    lines = out.splitlines()
    assert (code, errors) == (0, [])
    assert lines[0].split() == ["dictionary", "site", "layer", "width", "L0", "Neuronpedia"]
    assert [int(line.split()[4]) for line in lines[1:6]] == [22, 41, 82, 176, 445]
    assert lines[-1] == "5 dictionaries"
    assert lines[3].split()[0] == "google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"


def test_list_without_filters_is_the_whole_index(run):
    assert run("list")[1].splitlines()[-1] == f"{len(find())} dictionaries"
    assert (
        run("list", "--model", "gemma-2-2b", "--layer", 20, "--site", "att", "--l0", "canonical")[1].count("google/")
        == 2
    )


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("list", "--model", "gemma-2-3b"), "Gemma Scope has no model 'google/gemma-2-3b'. Did you mean"),
        (("list", "--width", "1m", "--site", "att"), "No dictionary fits all of these filters."),
        (("info", "gemma-2-2b/20-gemmascope-res-17k"), "Did you mean 'gemma-2-2b/20-gemmascope-res-16k'?"),
        (("info", "google/gemma-scope-2b-pt-res"), "names no dictionary. Write repo/path"),
    ],
)
def test_a_wrong_name_is_one_line(run, words, error):
    code, out, errors = run(*words)
    assert (code, out, len(errors)) == (1, "", 1)
    assert error in errors[0]


def test_info_by_every_name(run):
    code, out, _ = run("info", "gemma-2-2b/20-gemmascope-transcoder-16k")
    assert code == 0
    assert run("info", out.split()[1])[1] == out
    facts = dict(line.split(maxsplit=1) for line in out.splitlines() if not line.startswith(" "))
    assert facts["reads"] == "blocks.20.ln2.hook_normalized"
    assert facts["writes"] == "blocks.20.hook_mlp_out"
    assert facts["W_enc"] == "(2304, 16384)"
    assert facts["file"].endswith("params.npz, 302.1 MB of float32")
    assert out.splitlines()[-1].strip() == "https://www.neuronpedia.org/gemma-2-2b/20-gemmascope-transcoder-16k"


def test_info_describes_what_the_index_does_not_list(run):
    """A width that Gemma Scope never used, and a repository without its organisation."""
    code, out, errors = run("info", "google/gemma-scope-2b-pt-mlp/layer_0/width_1k/average_l0_5")
    assert (code, errors) == (0, [])
    assert "canonical    no" in out
    short = run("info", "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71")
    assert short == run("info", "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71")
    assert "canonical    yes" in short[1]


def test_info_knows_the_width_of_attention(run):
    assert "(2048, 16384)" in run("info", "google/gemma-scope-2b-pt-att/layer_3/width_16k/canonical")[1]


# ---- evaluate ----


def test_evaluate_prints_and_writes_what_evaluate_returns(run, suite, text, tmp_path):
    results, figure = tmp_path / "results.json", tmp_path / "fidelity.html"
    words = ("evaluate", suite, "--model", MODEL, "--text", text, "--context", 64, "--json", results, "--html", figure)
    code, out, errors = run(*words)
    assert (code, errors) == (0, [])
    assert [line.split()[:3] for line in out.splitlines()[1:3]] == [["res", "1", "64"], ["transcoder", "2", "64"]]
    found = read_results(results)
    assert list(found) == [RES, TRANSCODER]
    documents = text.read_text().split("\n<|endoftext|>\n")
    for name, result in found.items():
        site, layer = name.split("/")[0], int(name.split("layer_")[1][0])
        sae = each_sae(suite, name, site, layer)
        direct = evaluate(demo.load_model(), documents, saes=sae, context=64, progress=False)
        assert result.delta_loss == pytest.approx(direct.delta_loss, rel=1e-6)
        assert result.fvu == pytest.approx(direct.fvu, rel=1e-6)
        assert result.tokens_hash == direct.tokens_hash
        assert f"{direct.delta_loss:.4f}" in out
    assert figure.read_text().count("Fidelity by site") == 1
    assert not list(tmp_path.glob("*.part"))


def each_sae(suite, name, site, layer):
    from scope_lens.releases import read_npz

    return read_npz(suite / name, **hooks_for(site, layer)._asdict())


def test_a_second_run_computes_what_is_missing(run, suite, text, tmp_path, monkeypatch):
    results = tmp_path / "results.json"
    words = ("evaluate", suite, "--model", MODEL, "--text", text, "--context", 64, "--json", results)
    calls = []

    def interrupted_at_the_second(model, rows, *, saes, **settings):
        calls.append(saes.cfg.hook_out)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(model, rows, saes=saes, **settings)

    monkeypatch.setattr(each, "evaluate", interrupted_at_the_second)
    code, out, errors = run(*words)
    assert code == 130
    resume = f"{results} holds them and the same command goes on from there"
    assert errors == [f"scope-lens: interrupted after 1 of 2 dictionaries; {resume}"]
    assert list(read_results(results)) == [RES]
    assert out.splitlines()[1].startswith("res ")

    assert run(*words)[0] == 0
    assert calls == ["blocks.1.hook_resid_post", "blocks.2.hook_mlp_out", "blocks.2.hook_mlp_out"]
    assert list(read_results(results)) == [RES, TRANSCODER]
    whole = results.read_bytes()
    assert run(*words)[0] == 0
    assert len(calls) == 3
    assert results.read_bytes() == whole


def test_a_dictionary_retrained_in_place_is_measured_again(run, suite, text, tmp_path):
    """One weight in the middle of the decoder changes; name and path stay."""
    results = tmp_path / "results.json"
    words = ("evaluate", suite, "--model", MODEL, "--text", text, "--context", 64, "--json", str(results))
    assert run(*words)[0] == 0
    before = read_results(results)
    sae = each_sae(suite, RES, "res", 1)
    with torch.no_grad():
        sae.W_dec[37, 101] += 5.0
    save_gemma_scope(sae, suite / RES)
    assert run(*words)[0] == 0
    after = read_results(str(results))
    assert after[RES].delta_loss != before[RES].delta_loss
    assert after[TRANSCODER] == before[TRANSCODER]


def test_results_of_other_weights_of_the_model_are_refused(random_sae, tmp_path):
    sae = random_sae("blocks.0.hook_resid_post", d_in=192, d_sae=64)
    model, path = demo.load_model(), str(tmp_path / "results.json")
    tokens = model.to_tokens(demo.text()[0][:100])

    def measure():
        return list(each.evaluate_each(model, tokens, saes={"mine": sae}, path=path, progress=False))

    first = measure()
    assert repr(measure()) == repr(first)  # a NaN does not equal itself
    with torch.no_grad():
        next(iter(model.model.blocks[3].parameters())).mul_(1.5)
    with pytest.raises(ValueError, match="the results of another run: weights 'sha256:"):
        measure()


def test_two_suites_with_equal_paths_are_told_apart_by_their_folders(run, suite, text, tmp_path, random_sae):
    mlp = random_sae(*hooks_for("mlp", 1), d_in=192, d_sae=64)
    save_gemma_scope(mlp, suite / "mlp" / "layer_1/width_1k/average_l0_9")
    folders = (suite / "res", suite / "mlp")
    code, out, errors = run("evaluate", *folders, "--model", MODEL, "--text", text, "--context", 64)
    assert (code, errors) == (0, [])
    rows = [line.split() for line in out.splitlines()[1:3]]
    assert [(row[0], row[-1]) for row in rows] == [
        (folder.name, f"{folder}/layer_1/width_1k/average_l0_9") for folder in folders
    ]


def test_an_interrupted_evaluation_is_kept_and_marked(run, suite, text, tmp_path):
    """Ctrl-C in the second batch: the file says what was measured, and the next run measures it again."""
    results = tmp_path / "results.json"
    words = (
        "evaluate",
        suite / RES,
        "--model",
        MODEL,
        "--text",
        text,
        "--context",
        64,
        "--json",
        results,
        "--batch-size",
        1,
    )
    forwards = 0

    def count(module, args, output):
        nonlocal forwards
        if isinstance(module, torch.nn.Embedding):
            forwards += 1
            if forwards == 5:
                raise KeyboardInterrupt

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        assert run(*words)[0] == 130
    finally:
        handle.remove()
    (part,) = read_results(results).values()
    assert part.settings["complete"] is False
    assert part.settings["n_sequences"] == 1
    assert run(*words)[0] == 0
    (whole,) = read_results(results).values()
    assert whole.settings["complete"] is True


def test_a_saved_dictionary_and_a_single_file(run, random_sae, text, tmp_path):
    sae = random_sae("blocks.0.hook_resid_post", d_in=192, d_sae=64)
    sae.save(tmp_path / "mine")
    save_gemma_scope(sae, tmp_path / "loose")
    words = ("--model", MODEL, "--text", text, "--context", 64)
    _, saved, _ = run("evaluate", tmp_path / "mine", *words)
    _, single, _ = run("evaluate", tmp_path / "loose" / "params.npz", "--site", "res", "--layer", 0, *words)
    assert saved.splitlines()[1].split()[:9] == single.splitlines()[1].split()[:9]
    mirrored = tmp_path / "gemma-scope-2b-pt-res" / "layer_0" / "width_16k" / "average_l0_13"
    mirrored.parent.mkdir(parents=True)
    (tmp_path / "loose").rename(mirrored)
    assert loaders(str(mirrored))[str(mirrored)].args[0] == from_path(
        "gemma-scope-2b-pt-res", "layer_0/width_16k/average_l0_13"
    )
    mirrored.rename(tmp_path / "loose")
    code, _, errors = run("evaluate", tmp_path / "loose" / "params.npz", *words)
    assert code == 1
    assert "a params.npz does not say where it attaches" in errors[0]


def test_bad_input_is_one_line_and_nothing_is_written(run, suite, text, tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("M\xe4rchen".encode("latin-1"))
    other = tmp_path / "other.json"
    other.write_text("{}")
    before = sorted(tmp_path.iterdir())
    good = ("evaluate", suite / RES, "--model", MODEL, "--text", text)
    for words, error in [
        (("evaluate", suite / "none", "--model", MODEL, "--text", text), "There is no file or folder"),
        (("evaluate", suite, "--model", tmp_path / "none", "--text", text), "There is no folder"),
        (("evaluate", suite, "--model", MODEL, "--text", tmp_path / "none.txt"), "There is no text file"),
        (("evaluate", suite, "--model", MODEL, "--text", latin), "is no UTF-8 text"),
        ((*good, "--json", tmp_path / "none" / "r.json"), "cannot be written"),
        ((*good, "--html", tmp_path), "cannot be written"),
        ((*good, "--json", other), "is no file of results"),
        ((*good, "--context", 1), "a row needs at least 2 tokens"),
        ((*good, "--device", "foo"), "device='foo' cannot be used here"),
        ((*good, "--device", "cuda:99"), "device='cuda:99' cannot be used here"),
        (good[:1] + good[2:], "Name at least one dictionary"),
        (("evaluate", suite, suite, *good[2:]), "is named twice"),
    ]:
        code, out, errors = run(*words)
        assert (code, out, len(errors)) == (1, "", 1), words
        assert error in errors[0]
    assert sorted(tmp_path.iterdir()) == before


def test_results_of_another_text_are_refused(run, suite, text, tmp_path):
    results = tmp_path / "results.json"
    words = ("evaluate", suite / RES, "--model", MODEL, "--text", text, "--json", results)
    assert run(*words, "--context", 64)[0] == 0
    kept = results.read_bytes()
    code, _, errors = run(*words, "--context", 32)
    assert code == 1
    assert "holds the results of another run: tokens_hash 'sha256:" in errors[0]
    assert results.read_bytes() == kept


def test_results_are_valid_json(run, suite, text, tmp_path):
    """One sequence has no standard error; the file spells NaN as JSON allows."""
    results = tmp_path / "results.json"
    assert run("evaluate", suite / RES, "--model", MODEL, "--text", text, "--context", 256, "--json", results)[0] == 0
    (fields,) = json.loads(results.read_text(), parse_constant=pytest.fail)["results"].values()
    assert fields["delta_loss_se"] == "NaN"
