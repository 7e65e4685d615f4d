"""A model built so that the answer is known: the graph has to show what was put in, and interventions to confirm it.

A prompt names a subject and ends with a relation; the model looks the answer of the pair up.

1. At the subject, a latent of layer 0's transcoder recognises it and writes that it is known.
2. At the relation, attention of layer 1 fetches that from the subject.
3. There a latent of layer 1's transcoder, one for each pair, needs both the fetched subject and the relation, and
   writes the answer that the unembedding reads.

Everything else is noise: small random weights, filler tokens, and 180 decoy latents, of which a fifth are active.
"""

from typing import NamedTuple

import pytest
import torch
from graph_matching import nodes_of
from graph_oracle import LATENT, LOGIT, TOKEN, Node
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from scope_lens import HookedSAE, SAEConfig, ScopeModel
from scope_lens.circuits import Intervention, attribute, run_with_interventions, verify

WIDTH, LAYERS, HEAD, LATENTS, VOCAB, BOS = 64, 3, 16, 64, 64, 1
# Coordinates of the residual stream. The last 38 are noise.
ONE, SUBJECT, ASK, WHO, WHAT, KNOWN, FETCHED, ANSWER, NOISE = 0, 1, 2, 4, 8, 10, 14, 18, 26
SUBJECTS, RELATIONS = (10, 11, 12, 13), (20, 21)
PAIRS = [(s, r) for s in range(4) for r in range(2)]
MLP_OUT = "blocks.{}.hook_mlp_out"


def pair(s: int, r: int) -> int:
    return 2 * s + r


def answer(s: int, r: int) -> int:
    return 40 + pair(s, r)


def planted_at(number: int) -> int:
    """Where among the decoys a planted latent stands."""
    return 5 * number + 3


class Planted(NamedTuple):
    model: ScopeModel
    saes: list[HookedSAE]


@pytest.fixture(scope="module")
def planted() -> Planted:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, attn_implementation="eager", bos_token_id=BOS,
        eos_token_id=2,
    )  # fmt: skip
    hf = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        _plant_model(hf)
        saes = [_dictionary(layer) for layer in range(LAYERS)]
    return Planted(ScopeModel.from_hf(hf), saes)


def _plant_model(hf: LlamaForCausalLM) -> None:
    for parameter in hf.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 0.02)
    embed = hf.model.embed_tokens.weight
    embed.zero_()
    embed[:, NOISE:].normal_(0, 0.3)
    embed[:, ONE] = 1
    for s, token in enumerate(SUBJECTS):
        embed[token, SUBJECT], embed[token, WHO + s] = 1, 2
    for r, token in enumerate(RELATIONS):
        embed[token, ASK], embed[token, WHAT + r] = 1, 2
    # The slowest rotary pair, so that distance does not matter.
    first, second = hf.model.layers[0], hf.model.layers[1]
    second.self_attn.q_proj.weight[HEAD // 2 - 1, ASK] = 6
    second.self_attn.k_proj.weight[HEAD // 2 - 1, SUBJECT] = 6
    for s in range(4):
        first.mlp.gate_proj.weight[s, [WHO + s, ONE]] = torch.tensor([4.0, -4.0])
        first.mlp.up_proj.weight[s, ONE] = 1
        first.mlp.down_proj.weight[KNOWN + s, s] = 0.08
        second.self_attn.v_proj.weight[s, KNOWN + s] = 0.5
        second.self_attn.o_proj.weight[FETCHED + s, s] = 1
    for s, r in PAIRS:
        n = pair(s, r)
        second.mlp.gate_proj.weight[n, [FETCHED + s, WHAT + r, ONE]] = torch.tensor([3.0, 3.0, -8.0])
        second.mlp.up_proj.weight[n, ONE] = 1
        second.mlp.down_proj.weight[ANSWER + n, n] = 0.1
        hf.lm_head.weight[answer(s, r), ANSWER + n] = 3


def _dictionary(layer: int) -> HookedSAE:
    hooks = {"hook_in": f"blocks.{layer}.ln2.hook_normalized", "hook_out": MLP_OUT.format(layer)}
    sae = HookedSAE(SAEConfig(d_in=WIDTH, d_out=WIDTH, d_sae=LATENTS, **hooks))
    sae.W_enc.normal_(0, WIDTH**-0.5)
    sae.W_dec.normal_(0, 0.01)
    sae.b_dec.normal_(0, 0.02)
    sae.threshold.fill_(0.9)
    if layer == 0:
        latents = [([WHO + s, ONE], [4.0, -4.0], KNOWN + s, 0.2) for s in range(4)]
    elif layer == 1:
        latents = [([FETCHED + s, WHAT + r, ONE], [3.0, 3.0, -8.0], ANSWER + pair(s, r), 0.2) for s, r in PAIRS]
    else:
        latents = []
    for number, (reads, weights, writes, size) in enumerate(latents):
        n = planted_at(number)
        sae.W_enc[:, n] = 0
        sae.W_enc[reads, n] = torch.tensor(weights)
        sae.W_dec[n] = 0
        sae.W_dec[n, writes] = size
    return sae


def prompt(s: int, r: int, *, at: int = 2) -> Tensor:
    tokens = torch.tensor([BOS, 30, 33, 31, 32, RELATIONS[r]])
    tokens[at] = SUBJECTS[s]
    return tokens


def circuit(s: int, r: int, *, at: int = 2) -> dict[str, Node]:
    return {
        "subject": Node(TOKEN, "hook_embed", -1, at, SUBJECTS[s]),
        "relation": Node(TOKEN, "hook_embed", -1, 5, RELATIONS[r]),
        "known": Node(LATENT, MLP_OUT.format(0), 0, at, planted_at(s)),
        "lookup": Node(LATENT, MLP_OUT.format(1), 1, 5, planted_at(pair(s, r))),
        "answer": Node(LOGIT, "ln_final.hook_out", LAYERS, 5, answer(s, r)),
    }


def latents_of(graph) -> set[Node]:
    return {node for node in nodes_of(graph) if node.kind == LATENT}


@pytest.mark.parametrize(("s", "r"), PAIRS)
def test_pruning_leaves_the_planted_latents_alone(planted, s, r):
    graph = attribute(planted.model, prompt(s, r), saes=planted.saes, targets=[answer(s, r)], progress=False)
    assert len(latents_of(graph)) > 90  # the decoys
    known = circuit(s, r)
    small = graph.prune(node_mass=0.8, edge_mass=0.98)
    assert latents_of(small) == {known["known"], known["lookup"]}
    names = nodes_of(small)
    dense = small.dense()
    weight = {(names[t], names[s]): dense[t, s].item() for t, s in dense.nonzero().tolist()}
    assert weight[known["known"], known["subject"]] > 0
    for target, sources in (("answer", ["lookup"]), ("lookup", ["known", "relation"])):
        into = {source: abs(value) for (t, source), value in weight.items() if t == known[target]}
        strongest = sorted(into, key=into.__getitem__, reverse=True)[: len(sources)]
        assert set(strongest) == {known[source] for source in sources}


@pytest.mark.parametrize("at", [1, 4])
def test_the_circuit_moves_with_the_subject(planted, at):
    graph = attribute(planted.model, prompt(1, 0, at=at), saes=planted.saes, max_logits=1, progress=False)
    known = circuit(1, 0, at=at)
    assert known["answer"] in nodes_of(graph)
    assert latents_of(graph.prune()) == {known["known"], known["lookup"]}


def test_interventions_confirm_it(planted):
    s, r = 2, 1
    tokens, known = prompt(s, r), circuit(s, r)
    graph = attribute(planted.model, tokens, saes=planted.saes, targets=[answer(s, r)], progress=False)

    found = verify(graph, planted.model, saes=planted.saes, n=32, mode="direct")
    assert found.slope == pytest.approx(1, abs=1e-4)
    assert found.r2 == pytest.approx(1, abs=1e-4)

    def after(nodes: set[Node]) -> Tensor:
        edits = [Intervention(node.site, node.index, node.pos, 0.0) for node in nodes]
        logits = run_with_interventions(planted.model, tokens[None], saes=planted.saes, interventions=edits)
        return logits[0, -1].softmax(-1)

    circuit_latents = {known["known"], known["lookup"]}
    assert after(set())[answer(s, r)] > 0.9
    # Each of the two is needed; a hundred decoys are not.
    for node in circuit_latents:
        assert after({node})[answer(s, r)] < 0.3
    assert after(latents_of(graph) - circuit_latents)[answer(s, r)] > 0.9
    # Another subject's latent in place of this one's gives the other subject's answer.
    _, site, _, pos, own = known["known"][:5]
    active = graph.activation[nodes_of(graph).index(known["known"])].item()
    swap = [Intervention(site, own, pos, 0.0), Intervention(site, planted_at(0), pos, active)]
    logits = run_with_interventions(planted.model, tokens[None], saes=planted.saes, interventions=swap)
    assert int(logits[0, -1].argmax()) == answer(0, r)


def test_a_shuffled_decoder_shows_no_circuit(planted):
    """The baseline: with each latent's direction another's, the graph is made of errors."""
    shuffled = []
    for sae in planted.saes:
        state = {name: value.detach().clone() for name, value in sae.named_parameters()}
        state["W_dec"] = state["W_dec"].roll(1, dims=0)
        shuffled.append(HookedSAE.from_tensors(sae.cfg, state, source="shuffled"))
    for s, r in PAIRS[::3]:
        known = circuit(s, r)
        effect = {}
        for name, saes in (("real", planted.saes), ("shuffled", shuffled)):
            graph = attribute(planted.model, prompt(s, r), saes=saes, targets=[answer(s, r)], progress=False)
            nodes = nodes_of(graph)
            effect[name] = graph.dense()[nodes.index(known["answer"]), nodes.index(known["lookup"])].item()
            found = latents_of(graph.prune()) >= {known["known"], known["lookup"]}
            assert found is (name == "real")
            assert graph.scores().replacement > 0.7 if name == "real" else graph.scores().replacement < 0.3
        assert abs(effect["shuffled"]) < 0.1 * effect["real"]
