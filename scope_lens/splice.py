"""What a splice does to the activation at one site, with and without the error term.

Let x be what the encoder reads, y what flows at the decoder's site, f the latents.

Plain splice: y becomes `decode(f)`.

Error term: y becomes `y + (f' - f) @ W_dec + (e' - e)`, where `e = y - decode(f)` is what the dictionary misses, and f'
and e' are what the hooks at `hook_sae_acts_post` and `hook_sae_error` leave. Nothing edited gives y itself, bit for
bit.

1. Encode x once; a hook that edits the input costs a second encoding, because f must stay the unedited one.
2. Fire each hook on a copy, so that in-place edits are seen and do not reach the model's own tensor.
3. Sum the edits onto y in float32, and round once.
4. Gradients: the value above, and the gradient of `decode(f') + e'`. That is `g @ W_dec.T` at the latents, `g` at the
   error, and, since e depends on f and y, exactly the clean model's gradient upstream.

Positions in `untrained` keep y, and their error is zero.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from scope_lens.sae import HookedSAE


def splice(
    sae: HookedSAE,
    x: Float[Tensor, "*batch d_in"],
    y: Float[Tensor, "*batch d_out"],
    *,
    use_error_term: bool,
    untrained: Bool[Tensor, "*batch"] | None,
) -> Float[Tensor, "*batch d_out"]:
    """What flows on at the site: the reconstruction, or y plus what hooks edited.

    Args:
        sae: The dictionary; all its hook points fire, `hook_sae_error` only with the error term.
        x: What the encoder reads.
        y: What flows at the decoder's site; it is y itself for an autoencoder.
        use_error_term: Whether the reconstruction error is added back.
        untrained: True where y passes through unchanged.

    Returns:
        A tensor of y's dtype; y itself, the same object, where nothing changed and no gradient is asked for.
    """
    out = _with_error(sae, x, y, untrained) if use_error_term else _plain(sae, x, y)
    if untrained is not None and out is not y:
        out = torch.where(untrained.unsqueeze(-1), y, out)
    shown = _fire(sae.hook_sae_output, out)
    # Some TransformerLens components take another tensor object for an edit, so an unedited copy is not handed on.
    return shown if torch.is_grad_enabled() or _edited(shown, out) else out


def _plain(sae: HookedSAE, x: Tensor, y: Tensor) -> Tensor:
    x = _fire(sae.hook_sae_input, x)
    pre = _fire(sae.hook_sae_acts_pre, sae.pre_activation(x))
    acts = _fire(sae.hook_sae_acts_post, sae.activate(pre))
    return _fire(sae.hook_sae_recons, sae.reconstruct(acts, x)).to(y.dtype)


def _with_error(sae: HookedSAE, x: Tensor, y: Tensor, untrained: Tensor | None) -> Tensor:
    # The clean quantities have plain names; the ones that hooks may have edited end in _new.
    x_new = _fire(sae.hook_sae_input, x)
    pre_of_x_new = sae.pre_activation(x_new)
    input_edited = _edited(x_new, x)
    pre = sae.pre_activation(x) if input_edited else pre_of_x_new
    pre_new = _fire(sae.hook_sae_acts_pre, pre_of_x_new)
    acts_of_pre_new = sae.activate(pre_new)
    pre_edited = input_edited or _edited(pre_new, pre_of_x_new)
    acts = sae.activate(pre) if pre_edited else acts_of_pre_new
    acts_new = _fire(sae.hook_sae_acts_post, acts_of_pre_new)
    latents_edited = pre_edited or _edited(acts_new, acts_of_pre_new)

    if not any(_hooked(point) for point in sae.hook_points()):
        return y  # the gradient of y + 0 is y's own

    exact = torch.promote_types(torch.promote_types(y.dtype, sae.dtype), torch.float32)
    edits: list[Tensor] = []
    if latents_edited:
        edits.append(_latent_change(sae, acts, acts_new, x, x_new, exact))

    grad = torch.is_grad_enabled()
    if not (grad or _hooked(sae.hook_sae_recons) or _hooked(sae.hook_sae_error)):
        return _sum(y, edits, exact)

    recons = sae.reconstruct(acts, x)
    if grad and acts_new is not acts:
        recons_of_acts_new = sae.reconstruct(acts_new, x_new)
    else:
        recons_of_acts_new = (recons + edits[0]).to(recons.dtype) if edits else recons
    recons_new = _fire(sae.hook_sae_recons, recons_of_acts_new)
    if _edited(recons_new, recons_of_acts_new):
        edits.append((recons_new.to(exact) - recons_of_acts_new.to(exact)).detach())

    error = y.to(exact) - recons.to(exact)
    if untrained is not None:
        error = error.masked_fill(untrained.unsqueeze(-1), 0)
    error_new = _fire(sae.hook_sae_error, error)
    if _edited(error_new, error):
        edits.append((error_new - error).detach())

    out = _sum(y, edits, exact)
    if not grad:
        return out
    return _StraightThrough.apply(out.detach(), (recons_new.to(exact) + error_new).to(y.dtype))


@torch.no_grad()
def _latent_change(
    sae: HookedSAE, acts: Tensor, acts_new: Tensor, x: Tensor, x_new: Tensor, exact: torch.dtype
) -> Tensor:
    """`(f' - f) @ W_dec`, and the skip term's share when the input was edited."""
    difference = acts_new.to(exact) - acts.to(exact)
    change = sae.write(difference) if exact == sae.dtype else difference @ sae.W_dec.to(exact)
    if sae.W_skip is not None and x_new is not x:
        change = change + (x_new.to(exact) - x.to(exact)) @ sae.W_skip.to(exact)
    return change


def _sum(y: Tensor, edits: list[Tensor], exact: torch.dtype) -> Tensor:
    if not edits:
        return y
    return (y.to(exact) + torch.stack(edits).sum(0)).to(y.dtype)


def _hooked(point: HookPoint) -> bool:
    return bool(point.fwd_hooks or point.bwd_hooks)


def _fire(point: HookPoint, tensor: Tensor) -> Tensor:
    """Fire a hook point on a copy, so that an in-place edit stays inside the splice; without hooks there is no copy.

    What a hook returns is cast back: a float32 direction added to bfloat16 latents leaves bfloat16 latents.
    """
    return point(tensor.clone()).to(tensor.dtype) if _hooked(point) else tensor


def _edited(new: Tensor, old: Tensor) -> bool:
    return new is not old and not torch.equal(new, old)


class _StraightThrough(torch.autograd.Function):
    """Value of the first argument, gradient to the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor) -> Tensor:  # noqa: ARG004
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor]:  # noqa: ARG004
        return None, grad_outputs[0]
