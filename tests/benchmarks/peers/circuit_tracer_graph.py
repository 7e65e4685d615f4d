"""circuit-tracer's own attribution, pruning and JSON on the weights of bench_graph.py; see graph_arm.py.

The model is a HookedTransformer with its config written out (its table of names knows the published sizes alone) and
nothing folded, as `ReplacementModel.from_pretrained` has it. Pruning is part of its export; to time the JSON alone, the
export is given the pruning already made, and the tokenizer already read.
"""

from pathlib import Path
from unittest import mock

import torch
from circuit_tracer import attribute
from circuit_tracer.graph import Graph, PruneResult, compute_graph_scores, prune_graph
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from circuit_tracer.utils import create_graph_files
from graph_arm import ERROR, LATENT, LOGIT, TOKEN, GraphArm, hf_model, main
from torch import Tensor
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gemma_weights
from transformers import AutoTokenizer


def replacement_model(folder: Path, plan: dict) -> TransformerLensReplacementModel:
    hf, layers = hf_model(folder, plan), plan["config"]["num_hidden_layers"]
    cfg = HookedTransformerConfig(
        n_layers=layers, d_model=hf.config.hidden_size, d_head=hf.config.head_dim, n_ctx=plan["context"],
        n_heads=hf.config.num_attention_heads, n_key_value_heads=hf.config.num_key_value_heads,
        d_mlp=hf.config.intermediate_size, d_vocab=hf.config.vocab_size, act_fn="gelu_pytorch_tanh",
        normalization_type="RMS", eps=hf.config.rms_norm_eps, gated_mlp=True, final_rms=True,
        positional_embedding_type="rotary", rotary_dim=hf.config.head_dim, rotary_base=10000,
        use_attn_scale=True, use_normalization_before_and_after=True,
        use_local_attn=True, window_size=hf.config.sliding_window, attn_types=(["local", "global"] * layers)[:layers],
        attn_scores_soft_cap=hf.config.attn_logit_softcapping, output_logits_soft_cap=hf.config.final_logit_softcapping,
        model_name="random-gemma-2", original_architecture="Gemma2ForCausalLM", tokenizer_name=str(folder),
        dtype=torch.float32, device=plan["device"],
    )  # fmt: skip
    model = TransformerLensReplacementModel(cfg, tokenizer=AutoTokenizer.from_pretrained(folder))
    model.load_and_process_state_dict(
        convert_gemma_weights(hf, cfg), fold_ln=False, center_writing_weights=False, center_unembed=False,
        fold_value_biases=False,
    )  # fmt: skip
    del hf
    transcoders = load_transcoder_set(
        {layer: str(folder / f"layer_{layer}" / "params.npz") for layer in range(layers)},
        scan="random", feature_input_hook="ln2.hook_normalized", feature_output_hook="hook_mlp_out",
        special_load_fn="gemma-scope", device=torch.device(plan["device"]),
    )  # fmt: skip
    model._configure_replacement_model(transcoders)
    return model


def make(folder: Path, plan: dict) -> GraphArm:
    model, tokens = replacement_model(folder, plan), torch.tensor(plan["tokens"])
    state: dict[str, Graph | PruneResult] = {}

    def make_graph() -> None:
        state.clear()
        state["graph"] = attribute(tokens, model, batch_size=plan["batch"])

    def prune() -> None:
        # On the device and back, as its export does.
        state["graph"].to(plan["device"])
        state["pruned"] = PruneResult(*(part.cpu() for part in prune_graph(state["graph"])))
        state["graph"].to("cpu")

    def export(own: Path) -> None:
        with (
            mock.patch("circuit_tracer.graph.prune_graph", return_value=state["pruned"]),
            mock.patch("transformers.AutoTokenizer.from_pretrained", return_value=model.tokenizer),
        ):
            create_graph_files(state["graph"], "graph", own)

    def result() -> dict[str, Tensor]:
        graph, pruned = state["graph"], state["pruned"]
        target, source = graph.adjacency_matrix.nonzero(as_tuple=True)
        kept_target, kept_source = pruned.edge_mask.nonzero(as_tuple=True)
        nodes = nodes_of(graph)
        activation = torch.full((len(nodes),), torch.nan)
        activation[: len(graph.activation_values)] = graph.activation_values
        activation[len(nodes) - len(graph.logit_probabilities) :] = graph.logit_probabilities
        return {
            "nodes": nodes, "activation": activation,
            "target": target.int(), "source": source.int(), "weight": graph.adjacency_matrix[target, source],
            "kept": pruned.node_mask, "kept_target": kept_target.int(), "kept_source": kept_source.int(),
            "scores": torch.tensor(compute_graph_scores(graph)),
        }  # fmt: skip

    return GraphArm(make_graph, prune, export, result)


def nodes_of(graph: Graph) -> Tensor:
    """(node, 4): kind, layer, position, index, in the peer's order."""
    layers, positions = graph.cfg.n_layers, graph.n_pos
    rows = [[LATENT, *latent] for latent in graph.active_features[graph.selected_features].tolist()]
    rows += [[ERROR, layer, pos, -1] for layer in range(layers) for pos in range(positions)]
    rows += [[TOKEN, -1, pos, token] for pos, token in enumerate(graph.input_tokens.tolist())]
    rows += [[LOGIT, layers, positions - 1, target.vocab_idx] for target in graph.logit_targets]
    return torch.tensor(rows)


if __name__ == "__main__":
    main(make, ("circuit-tracer", "transformer-lens", "transformers", "torch"))
