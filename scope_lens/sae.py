"""One dictionary: an encoder, an activation, a decoder, and the six hook points between them.

    pre   = x @ W_enc + b_enc
    f     = activation(pre)                        JumpReLU: f = pre * (pre > threshold), strict
    x_hat = f @ W_dec + b_dec (+ x @ W_skip)

An autoencoder writes where it reads (`hook_out == hook_in`); a transcoder writes elsewhere. There is one class for
both, because nothing else differs (docs/decisions/0002). The weights are stored as Gemma Scope's files store them:
`W_enc` is (d_in, d_sae), `W_dec` is (d_sae, d_out), and rows of `W_dec` are latent directions.

Precision: `pre` is accumulated in float32 and compared with a float32 threshold before anything is rounded to bfloat16,
because a rounded pre-activation flips latents near their threshold.

Sources: Gemma Scope (arXiv 2408.05147), section 2 for the equations, Appendix A and B for `HookedSAE.to_inference`.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from scope_lens.activations import batchtopk, jumprelu, relu, topk
from scope_lens.sae_config import SAEConfig, parameter_shapes, read_config
from scope_lens.whole_file import whole_file

_HALF = (torch.bfloat16, torch.float16)
# Below this share of active latents a gather of decoder rows beats the dense product on a CPU; measured in
# docs/benchmarks (break-even is near 12 %). Narrow decoders lose to the cost of finding the active entries.
_SPARSE_DENSITY = 0.05
_SPARSE_MIN_WIDTH = 512
_DENSITY_SAMPLE = 16
_REREADS = 4  # active entries for each row of W_dec from which blocking pays
_BLOCK = 128  # columns: 8 MB at 16k latents


class HookedSAE(HookedRootModule):
    """A sparse autoencoder or transcoder with TransformerLens hook points.

    Hook points, in firing order: `hook_sae_input`, `hook_sae_acts_pre`, `hook_sae_acts_post`, `hook_sae_recons`,
    `hook_sae_error` (only when spliced with an error term) and `hook_sae_output`.

    A new dictionary holds zeros; a loader or a trainer fills it. `threshold` exists for JumpReLU alone and `W_skip` for
    a dictionary with a skip term alone; they are None otherwise.

    Args:
        cfg: What the dictionary is and where it attaches.
    """

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, " d_sae"] | None
    W_skip: Float[Tensor, "d_in d_out"] | None

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        for name, shape in parameter_shapes(cfg).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        for name in ("threshold", "W_skip"):
            if name not in self._parameters:
                self.register_parameter(name, None)
        self.hook_sae_input = HookPoint()
        self.hook_sae_acts_pre = HookPoint()
        self.hook_sae_acts_post = HookPoint()
        self.hook_sae_recons = HookPoint()
        self.hook_sae_error = HookPoint()
        self.hook_sae_output = HookPoint()
        self.setup()

    # ---- the equations, without hooks ----

    def pre_activation(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """`pre = x @ W_enc + b_enc`, accumulated in float32 and left unrounded; fires no hook.

        Raises:
            ValueError: The last axis of `x` is not `d_in`.
        """
        if x.shape[-1] != self.cfg.d_in:
            raise ValueError(
                f"The dictionary for {self.cfg.hook_in!r} reads activations of width d_in={self.cfg.d_in}; "
                f"found shape {tuple(x.shape)}. Pass the activation of its own site (hook_z flattened over heads)."
            )
        x = x.to(self.W_enc.dtype)
        if self.cfg.pre_encoder_bias:
            x = x - self.b_dec
        weight, bias = self.W_enc, self.b_enc
        if weight.dtype in _HALF:
            x, weight, bias = x.float(), weight.float(), bias.float()
        # Autocast would round what the threshold is compared with. One kernel for x @ weight + bias is an eighth faster
        # on a CPU than two.
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x, weight.T, bias)

    def activate(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """The activation function, decided on `pre` as given and then cast to the dictionary's dtype; fires no hook."""
        match self.cfg.activation:
            case "jumprelu":
                assert self.threshold is not None
                acts = jumprelu(pre, self.threshold)
            case "relu":
                acts = relu(pre)
            case "topk":
                assert self.cfg.k is not None
                acts = topk(pre, self.cfg.k)
            case "batchtopk":
                assert self.cfg.k is not None
                acts = batchtopk(pre, self.cfg.k)
        return acts.to(self.W_enc.dtype)

    def write(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """`f @ W_dec`, what the latents write; fires no hook.

        On a CPU, where no gradient is asked for and few latents are active, the active rows of `W_dec` are gathered
        instead; the result is the dense product's up to the order of summation.
        """
        if self._gather_pays(acts):
            return _gather_rows(acts, self.W_dec)
        return acts @ self.W_dec

    def reconstruct(
        self, acts: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"] | None
    ) -> Float[Tensor, "*batch d_out"]:
        """`f @ W_dec + b_dec (+ x @ W_skip)`; fires no hook.

        Raises:
            ValueError: The dictionary has a skip term and `x` is missing.
        """
        if self._gather_pays(acts):
            recons = _gather_rows(acts, self.W_dec) + self.b_dec
        else:
            recons = nn.functional.linear(acts, self.W_dec.T, self.b_dec)
        if self.W_skip is not None:
            if x is None:
                raise ValueError(
                    f"The dictionary for {self.cfg.hook_out!r} has a skip term x @ W_skip, so decode needs the "
                    "encoder's input too: call decode(acts, x), or forward(x)."
                )
            recons = recons + x.to(self.W_skip.dtype) @ self.W_skip
        return recons

    # ---- the equations, with hooks ----

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """`f = activation(x @ W_enc + b_enc)`; fires `hook_sae_input`, `hook_sae_acts_pre`, `hook_sae_acts_post`.

        Raises:
            ValueError: The last axis of `x` is not `d_in`.
        """
        return self._encode_hooked(self.hook_sae_input(x))

    def decode(
        self, acts: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """`x_hat = f @ W_dec + b_dec (+ x @ W_skip)`; fires `hook_sae_recons`.

        Args:
            acts: Latents.
            x: The encoder's input; needed when the dictionary has a skip term.

        Raises:
            ValueError: The dictionary has a skip term and `x` is missing.
        """
        return self.hook_sae_recons(self.reconstruct(acts, x))

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """`x_hat` of the activation `x`, the skip term included; fires every hook point but `hook_sae_error`."""
        x = self.hook_sae_input(x)
        return self.hook_sae_output(self.decode(self._encode_hooked(x), x))

    def _encode_hooked(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        pre = self.hook_sae_acts_pre(self.pre_activation(x))
        return self.hook_sae_acts_post(self.activate(pre))

    def _gather_pays(self, acts: Tensor) -> bool:
        needs_grad = torch.is_grad_enabled() and (acts.requires_grad or self.W_dec.requires_grad)
        if needs_grad or acts.device.type != "cpu" or self.W_dec.dtype in _HALF or acts.dtype != self.W_dec.dtype:
            return False
        if self.cfg.d_out < _SPARSE_MIN_WIDTH or acts.numel() == 0:
            return False
        # A few evenly spaced rows tell the density; counting all of them costs as much as finding the active entries.
        rows = acts.reshape(-1, acts.shape[-1])
        sample = rows[:: max(1, len(rows) // _DENSITY_SAMPLE)]
        return int(torch.count_nonzero(sample)) < _SPARSE_DENSITY * sample.numel()

    # ---- forms ----

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the dictionary computes in."""
        return self.W_enc.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_enc.device

    @torch.no_grad()
    def to_inference(self, scale: float) -> "HookedSAE":
        """Fold the training normalisation `x = x_raw / scale` into the biases and the threshold.

        The result reads raw activations and writes raw reconstructions: `b_enc`, `threshold` and `b_dec` are multiplied
        by `scale`, a pre-encoder bias is folded (`b_enc' = scale * (b_enc - b_dec @ W_enc)`), and `W_enc`, `W_dec` and
        `W_skip` stay. Latents grow by the factor `scale`; the active set and `x_hat / scale` do not change.

        Args:
            scale: Root mean square norm of the raw inputs over the training data; for a transcoder that reads
                normalised activations it is sqrt(d_in), and its target was divided by the same number.

        Raises:
            ValueError: `scale` is not positive and finite.

        Source: Gemma Scope, Appendix A (autoencoders) and Appendix B (transcoders).
        """
        if not 0 < scale < float("inf"):
            raise ValueError(f"to_inference needs the positive, finite norm of the raw inputs; found scale={scale}.")
        folded = HookedSAE(dataclasses.replace(self.cfg, pre_encoder_bias=False)).to(self.device, self.dtype)
        state = self.state_dict()
        if self.cfg.pre_encoder_bias:
            state["b_enc"] = self.b_enc - self.b_dec @ self.W_enc
        state |= {name: scale * state[name] for name in ("b_enc", "b_dec", "threshold") if name in state}
        folded.load_state_dict(state)
        return folded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HookedSAE":
        # A threshold rounded to bfloat16 changes which latents fire, so half-precision casts leave it in float32.
        before = self.threshold
        exact = before.data if before is not None else None
        super()._apply(fn, recurse)
        after = self.threshold
        if exact is not None and after is not None and after.dtype in _HALF:
            after.data = exact.to(device=after.device, dtype=torch.float32)
            if after.grad is not None:
                after.grad = after.grad.float()
        return self

    # ---- files ----

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `sae.safetensors` into `folder`, each whole or not at all.

        Args:
            folder: Created if missing; earlier files of these names are replaced.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Both are complete before either takes its name: a full disk leaves an earlier pair as it was.
        with whole_file(folder / "config.json") as config, whole_file(folder / "sae.safetensors") as weights:
            save_file({k: v.contiguous() for k, v in self.state_dict().items()}, weights)
            config.write_text(json.dumps(dataclasses.asdict(self.cfg), indent=2) + "\n")

    @classmethod
    def load(
        cls, folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> "HookedSAE":
        """Read what `save` wrote.

        Args:
            folder: Holds `config.json` and `sae.safetensors`.
            device: Where the weights go.
            dtype: Dtype of the weights; None keeps the file's. `threshold` stays float32 for half-precision dtypes.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file is truncated, or does not hold what the config says.
        """
        folder = Path(folder)
        cfg = read_config(folder / "config.json")
        weights = folder / "sae.safetensors"
        if not weights.is_file():
            raise FileNotFoundError(f"{weights} is missing; a saved HookedSAE has config.json and sae.safetensors.")
        try:
            with safe_open(weights, framework="pt", device=str(device)) as file:
                state = {name: _cast(name, file.get_tensor(name), dtype) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{weights} is no complete safetensors file ({error}); copy or save it again.") from None
        return cls.from_tensors(cfg, state, source=str(weights))

    @classmethod
    def from_tensors(cls, cfg: SAEConfig, state: dict[str, Tensor], *, source: str) -> "HookedSAE":
        """Build a dictionary around tensors that exist already, without copying them.

        Args:
            cfg: What the dictionary is.
            state: One tensor for each parameter, of one device.
            source: Where they came from, for the error message.

        Raises:
            ValueError: A tensor is missing, unknown, wrongly shaped or not finite.
        """
        expected = parameter_shapes(cfg)
        if state.keys() != expected.keys():
            raise ValueError(
                f"{source}: expected the arrays {sorted(expected)}, found {sorted(state)}. Is it another kind of file?"
            )
        for name, shape in expected.items():
            if tuple(state[name].shape) != shape:
                raise ValueError(f"{source}: {name} has shape {tuple(state[name].shape)}, expected {shape}.")
            # One pass that catches NaN and both infinities, 25 times faster than isfinite().all() on a CPU.
            low, high = state[name].aminmax()
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise ValueError(f"{source}: {name} holds numbers that are not finite; the file is damaged.")
        with torch.device("meta"):
            sae = cls(cfg)
        sae.load_state_dict(state, assign=True)
        return sae

    @classmethod
    def from_pretrained(
        cls,
        release: str,
        path: str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        local_dir: str | Path | None = None,
    ) -> "HookedSAE":
        """Load a published dictionary, e.g. `("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")`.

        Args:
            release: Repository on the hub.
            path: Path inside it, with or without `params.npz`.
            device: Where the weights go.
            dtype: Dtype of the weights; `threshold` stays float32.
            revision: Commit of the repository; None takes the one that scope_lens pins.
            local_dir: A mirror of the repository, or of several; then no network is used.

        Raises:
            KeyError: A repository or path that Gemma Scope does not have.
            FileNotFoundError: The mirror lacks the file.
            ValueError: The file is not what its path says.
        """
        from scope_lens import releases

        return releases.load(
            releases.from_path(release, path), device=device, dtype=dtype, revision=revision, local_dir=local_dir
        )


def _gather_rows(acts: Float[Tensor, "*batch d_sae"], weight: Float[Tensor, "d_sae d_out"]) -> Tensor:
    """`acts @ weight` by summing the weighted rows of the active latents."""
    flat = acts.reshape(-1, acts.shape[-1])
    rows, latents = flat.nonzero(as_tuple=True)
    ends = torch.bincount(rows, minlength=flat.shape[0]).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    values = flat[rows, latents]

    def gathered(columns: Tensor) -> Tensor:
        return nn.functional.embedding_bag(latents, columns, starts, mode="sum", per_sample_weights=values)

    if len(latents) < _REREADS * len(weight):
        out = gathered(weight)
    else:
        # Rows are read again and again: blocks of columns that stay in the cache pay for being copied.
        out = torch.cat([gathered(block.contiguous()) for block in weight.split(_BLOCK, dim=1)], dim=1)
    return out.reshape(*acts.shape[:-1], weight.shape[1])


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return tensor
    return tensor.to(torch.float32 if name == "threshold" and dtype in _HALF else dtype)
