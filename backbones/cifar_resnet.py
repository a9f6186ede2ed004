"""ResNets for 32×32 images: cifar_resnet20, cifar_resnet32, cifar_resnet56.

He et al. 2016, Deep residual learning for image recognition, section 4.2, https://arxiv.org/abs/1512.03385
    3×3 stem of 16 channels, no pooling; three stages of n = (depth - 2) / 6 basic blocks with 16, 32, 64 channels.
Shortcuts are the paper's option A for these networks: where a stage halves the map, the identity is strided and padded
with zero channels, so shortcuts have no parameters (resnet20: 0.27 M, as in the paper's table 6). Option B (a 1×1
projection), which timm's ResNet uses, would add parameters the published networks do not have.
Deviation: the last norm of a block starts at zero, as in timm's ResNet (zero_init_last=False: at one, as in the paper),
except where a shortcut pads: there all new channels would be exactly zero before the ReLU, get no gradient, and stay
zero for ever.

Blocks, head, initialisation and state-dict names are timm's ResNet: conv1, bn1, layer1.0.conv1 …, fc.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, create_classifier, get_act_layer, get_norm_layer
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

__all__ = ["CifarResNet", "CIFAR_MEAN", "CIFAR_STD"]

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)


class PadShortcut(nn.Module):
    """Option A: (B, C, H, W) → (B, C + new_channels, ⌈H/stride⌉, ⌈W/stride⌉), the new channels zero."""

    def __init__(self, new_channels: int, stride: int):
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


class CifarResNet(ResNet):
    """timm's ResNet with the stem and the three stages of the CIFAR form.

    Any image size works; a stage that strides gives ⌈H/2⌉ × ⌈W/2⌉. Features: act1 (16 channels, stride 1),
    layer1 (16, stride 1), layer2 (32, stride 2), layer3 (64, stride 4).

    Args:
        layers: basic blocks in each of the three stages; three positive ints.
        num_classes: classes of the head; 0 leaves it out.
        in_chans: channels of the image.
        global_pool: 'avg', 'max', 'avgmax', 'catavgmax', or '' for none.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth, growing linearly from 0 at the first block.
        act_layer, norm_layer: a class or the name timm knows it by.
        zero_init_last: start the last norm of every block that keeps its width at zero.
        block_args: further arguments of timm's BasicBlock, such as attn_layer.

    Raises:
        ValueError: if layers is not three positive ints.
    """

    def __init__(
        self,
        layers,
        num_classes=10,
        in_chans=3,
        global_pool="avg",
        drop_rate=0.0,
        drop_path_rate=0.0,
        act_layer=nn.ReLU,
        norm_layer=nn.BatchNorm2d,
        zero_init_last=True,
        block_args=None,
        device=None,
        dtype=None,
    ):
        if len(layers) != 3 or min(layers) < 1:
            raise ValueError(f"layers must be three positive ints, one per stage, got {layers!r}")
        nn.Module.__init__(self)  # ResNet's own constructor would build the ImageNet stem and four stages
        dd = dict(device=device, dtype=dtype)
        act_layer, norm_layer = get_act_layer(act_layer), get_norm_layer(norm_layer)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False, **dd)
        self.bn1 = norm_layer(16, **dd)
        self.act1 = act_layer(inplace=True)
        self.feature_info = [dict(num_chs=16, reduction=1, module="act1")]

        drop_path = [drop_path_rate * i / (sum(layers) - 1) for i in range(sum(layers))]
        chs, reduction = 16, 1
        for stage, (out_chs, depth) in enumerate(zip((16, 32, 64), layers), start=1):
            blocks = []
            for _ in range(depth):
                stride = 1 if out_chs == chs else 2
                rate = drop_path.pop(0)
                blocks.append(
                    BasicBlock(
                        chs,
                        out_chs,
                        stride,
                        downsample=PadShortcut(out_chs - chs, stride) if stride > 1 else None,
                        drop_path=DropPath(rate) if rate > 0 else None,
                        act_layer=act_layer,
                        norm_layer=norm_layer,
                        **(block_args or {}),
                        **dd,
                    )
                )
                chs, reduction = out_chs, reduction * stride
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            self.feature_info.append(dict(num_chs=chs, reduction=reduction, module=f"layer{stage}"))

        self.num_features = chs
        self.global_pool, self.fc = create_classifier(chs, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = chs * self.global_pool.feat_mult()
        self.init_weights(zero_init_last=zero_init_last)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """As timm's ResNet, but the last norm of a block whose shortcut pads always starts at one."""
        super().init_weights(zero_init_last=zero_init_last)
        for block in self.modules():
            pads = isinstance(getattr(block, "downsample", None), PadShortcut)
            if pads and getattr(block.bn2, "weight", None) is not None:
                nn.init.ones_(block.bn2.weight)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) → features (B, 64, ⌈H/4⌉, ⌈W/4⌉)."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([self.layer1, self.layer2, self.layer3], x, flatten=True)
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices=None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """Features of the chosen taps (0: act1, 1-3: layer1-3), each (B, C, H, W); as in timm's ResNet.

        Args:
            x: images (B, in_chans, H, W).
            indices: an int for the last n taps, a list of taps, None for all.
            norm: accepted for timm's interface; the taps have no separate norm.
            stop_early: leave out the stages after the last tap.
            output_fmt: 'NCHW' only.
            intermediates_only: return the list alone instead of (final features, list).
        """
        assert output_fmt == "NCHW", f"output_fmt must be 'NCHW', got {output_fmt!r}"
        take, last = feature_take_indices(4, indices)
        stages = [self.layer1, self.layer2, self.layer3]
        x = self.act1(self.bn1(self.conv1(x)))
        intermediates = [x] if 0 in take else []
        for tap, stage in enumerate(stages[:last] if stop_early else stages, start=1):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing and not torch.jit.is_scripting() else stage(x)
            if tap in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(self, indices=1, prune_norm: bool = False, prune_head: bool = True):
        """Remove the stages (and the head) that the chosen taps do not need; returns the taps kept."""
        take, last = feature_take_indices(4, indices)
        for tap in range(last + 1, 4):
            setattr(self, f"layer{tap}", nn.Sequential())
        if last < 3:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or last < 3:
            self.reset_classifier(0, "")
        return take


def _create(variant, pretrained, depth, **kwargs):
    layers = ((depth - 2) // 6,) * 3
    return build_model_with_cfg(
        CifarResNet, variant, pretrained, feature_cfg=dict(out_indices=(0, 1, 2, 3)), layers=layers, **kwargs
    )


def _cfg(**kwargs):
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:1512.03385",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "cifar_resnet20.untrained": _cfg(),
        "cifar_resnet32.untrained": _cfg(),
        "cifar_resnet56.untrained": _cfg(),
    }
)


@register_model
def cifar_resnet20(pretrained=False, **kwargs) -> CifarResNet:
    """ResNet-20 for 32×32 images, three blocks a stage."""
    return _create("cifar_resnet20", pretrained, 20, **kwargs)


@register_model
def cifar_resnet32(pretrained=False, **kwargs) -> CifarResNet:
    """ResNet-32 for 32×32 images, five blocks a stage."""
    return _create("cifar_resnet32", pretrained, 32, **kwargs)


@register_model
def cifar_resnet56(pretrained=False, **kwargs) -> CifarResNet:
    """ResNet-56 for 32×32 images, nine blocks a stage."""
    return _create("cifar_resnet56", pretrained, 56, **kwargs)
