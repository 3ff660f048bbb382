"""Small ViTs for the analyses' tests."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lut_ds.analysis.subject import Subject


def small_vit(**options: object) -> VisionTransformer:
    """16 px in patches of 4 px, width 24, 3 blocks, 3 heads; weights large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0}
    model = VisionTransformer(**{**sizes, "global_pool": "avg", "fc_norm": False, **options}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def subject(model: VisionTransformer, images: int = 20, name: str = "model", labels: Tensor | None = None) -> Subject:
    """The model with smooth images drawn by a fixed seed; its feature is the mean patch token."""
    side = model.patch_embed.img_size[0]
    small = torch.rand(images, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    pixels = torch.nn.functional.interpolate(small, (side, side), mode="bilinear")
    pixels = (255 * pixels).permute(0, 2, 3, 1).to(torch.uint8)

    def normalise(values: Tensor) -> Tensor:
        return (values.float() / 255 - 0.5).permute(0, 3, 1, 2) * 4

    def features(values: Tensor) -> Tensor:
        return model.forward_features(values)[:, model.num_prefix_tokens :].mean(dim=1)

    return Subject(name, model, pixels, labels, normalise, features, batch_size=8)
