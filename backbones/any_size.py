"""torchvision's ViT for images of any size: it is made for one, and square."""

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torchvision.models import VisionTransformer


class AnySize(VisionTransformer):
    """A VisionTransformer whose table of positions is interpolated to the grid of its patches."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, 3, H, W)."""
        patches = self.conv_proj(x)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        own = self.image_size // self.patch_size
        positions = resample_abs_pos_embed(
            self.encoder.pos_embedding, [patches.shape[2], patches.shape[3]], [own, own], num_prefix_tokens=1
        )
        encoder = self.encoder
        return self.heads(encoder.ln(encoder.layers(encoder.dropout(tokens + positions)))[:, 0])


def any_size(model: VisionTransformer) -> VisionTransformer:
    """Lets a ViT of torchvision take images of any height and width, and returns it.

    Parameters stay what they are, and so do answers at the model's own size, bit for bit. At another size its table of
    positions is interpolated, bicubically, as timm does, in every pass; pixels that fill no patch are left out.
    The encoder's parts are run, not the encoder: what is hooked to ``model.encoder`` itself is passed by.

    Raises:
        ValueError: the model is another than torchvision's.
    """
    if type(model) not in (VisionTransformer, AnySize):
        raise ValueError(f"model={type(model).__name__}: must be a VisionTransformer of torchvision")
    model.__class__ = AnySize
    return model
