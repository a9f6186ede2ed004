"""The rotary positions of a host of timm's, as those of the mixers that take its attention's place."""

import copy

import torch
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed, apply_rot_embed_cat
from timm.models.eva import Eva
from torch import nn

from vision_attn import Grid, Mixer
from vision_attn.rotary import Rotary

from .hosts import like


def hand_on(model: nn.Module, attention: nn.Module, layer: int, mixer: Mixer) -> list[str] | None:
    """Gives ``mixer`` the rotary positions that the host's ``attention`` is handed, and the names of its parameters
    that are copied for it; None where the host has none that are known, or the mixer can't have them.

    Args:
        layer: which of the host's self-attentions it is.
    """
    steps = {name: step for name, step in mixer.named_modules() if step in mixer.steps and not step.rotary_refusal}
    if mixer.rotary_refusal or not steps:
        return None
    made = {name: _made_like(model, attention, layer, step) for name, step in steps.items()}
    if None in made.values():
        return None
    for name, step in steps.items():
        step.rotary = made[name]
    return [f"{name}.rotary.{key}".lstrip(".") for name, rotary in made.items() for key in rotary.state_dict()]


def drop(model: nn.Module) -> None:
    """Takes what made rotary positions out of a host whose attentions all make their own."""
    if isinstance(model, Eva):  # which runs without
        model.rope = None


def _made_like(model: nn.Module, attention: nn.Module, layer: int, step: Mixer) -> Rotary | None:
    """The host's rotary positions for a step of a mixer; None if they can't be told, or are for other heads."""
    rope = getattr(model, "rope", None)
    forms = {RotaryEmbeddingCat: "axial", RotaryEmbeddingDinoV3: "dinov3", RotaryEmbeddingMixed: "mixed"}
    form, channels = forms.get(type(rope)), step.head_dims[0]
    if form is None or channels % 4 or not hasattr(attention, "rotate_half"):
        return None
    rotary = Rotary(
        form,
        step.num_heads,
        channels,
        base=rope.temperature,
        offset=getattr(rope, "grid_offset", 0.0),
        x_first=rope.grid_indexing == "xy",
        halves=attention.rotate_half,
        reference=getattr(rope, "ref_feat_shape", None),
        **like(model),
    ).train(model.training)
    if form == "mixed":
        theirs = rope.freqs.detach()[:, layer]
        if theirs.shape != rotary.frequencies.shape:
            return None
        rotary.frequencies.data.copy_(theirs if rotary.x_first else theirs.flip(0))
    return rotary if _turns_alike(rotary, rope, layer) else None


@torch.no_grad()
def _turns_alike(rotary: Rotary, rope: nn.Module, layer: int) -> bool:
    """Whether both turn alike on a grid that the host takes: hosts have options that are not known here."""
    rope = copy.deepcopy(rope).eval()  # in training it may shift its coordinates
    grid = Grid.of(rope.feat_shape or (3, 5))
    theirs = rope.get_embed() if rope.feat_shape else rope.get_embed(list(grid))
    theirs = theirs[layer] if theirs.ndim == 4 else theirs[None]  # (heads or 1, H·W, 2 d)
    if theirs.shape[-1] != 4 * rotary.pairs:
        return False
    x = torch.linspace(-1, 1, theirs[..., 0].numel() * 2 * rotary.pairs, device=theirs.device)
    x = x.reshape(1, *theirs.shape[:2], 2 * rotary.pairs)
    ours, same = rotary(x, x, grid)[0], apply_rot_embed_cat(x, theirs.to(x.dtype), half=rotary.halves)
    # theirs were made in float32, and may have been rounded further
    rounding = max(torch.finfo(dtype).eps for dtype in (theirs.dtype, torch.float32))
    return x.is_meta or torch.allclose(ours, same, atol=100 * rounding)
