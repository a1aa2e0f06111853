"""Networks with rectifiers that are small enough to test, and how many of their layers receive spikes."""

import timm
import torch
from torch import nn
from torchvision import models as torchvision

SMALL = torch.Generator().manual_seed(7)
IMAGES = torch.randn(4, 3, 32, 32, generator=SMALL)


def torchvision_vgg():
    """vgg11_bn, with fewer than its 119 million parameters of linear layers."""
    with torch.device("meta"):
        model = torchvision.vgg11_bn(num_classes=10, init_weights=False)
    layers = [nn.Linear(512 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 32), nn.ReLU(True), nn.Linear(32, 10)]
    model.classifier = nn.Sequential(*layers)
    model.features.to_empty(device="cpu")
    for module in model.features:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def named(name, **arguments):
    return lambda: timm.create_model(name, num_classes=10, **arguments)


def of_torchvision(name):
    return lambda: getattr(torchvision, name)(num_classes=10)


# By name: its maker; the layers that receive spikes; the layers.
NETWORKS = {
    # All but stem and read-out, which follows the average over the map.
    "timm resnet18": (named("resnet18"), 17 + 3 - 1, 17 + 3 + 1),
    "timm resnet50": (named("resnet50"), 49 + 4 - 1, 49 + 4 + 1),
    "timm regnetx_002": (named("regnetx_002"), 13 * 3 + 4, 13 * 3 + 4 + 2),
    "timm densenet121": (named("densenet121"), 58 * 2 + 3, 58 * 2 + 3 + 2),
    # Seven of eight convolutions, also behind max pooling, and the second of the head, whose first is behind an average
    # where the map is smaller than its kernel.
    "timm vgg11_bn": (named("vgg11_bn", mlp_ratio=0.01), 7 + 1, 8 + 3),
    # The depthwise convolution of each block and the one that follows; what goes into a block is a sum or linear.
    "timm mobilenetv2_100": (named("mobilenetv2_100"), 17 * 2, 1 + 2 + 16 * 3 + 2),
    # The depthwise convolution and, of squeeze-and-excitation, the second; its gate is a product that stays analogue.
    "timm efficientnet_b0": (named("efficientnet_b0"), 16 * 2, 1 + 4 + 15 * 5 + 2),
    # The second layer of each MLP.
    "timm convnext_femto": (named("convnext_femto"), 12, 1 + 12 * 3 + 3 + 1),
    "timm vit_tiny": (named("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2), 2, 1 + 2 * 5 + 1),
    "torchvision resnet18": (of_torchvision("resnet18"), 17 + 3 - 1, 17 + 3 + 1),
    "torchvision resnet50": (of_torchvision("resnet50"), 49 + 4 - 1, 49 + 4 + 1),
    "torchvision regnet_x_400mf": (of_torchvision("regnet_x_400mf"), 22 * 3 + 4, 22 * 3 + 4 + 2),
    "torchvision densenet121": (of_torchvision("densenet121"), 58 * 2 + 3, 58 * 2 + 3 + 2),
    "torchvision vgg11_bn": (torchvision_vgg, 7 + 2, 8 + 3),
    "torchvision mobilenet_v2": (of_torchvision("mobilenet_v2"), 17 * 2, 1 + 2 + 16 * 3 + 2),
    "torchvision efficientnet_b0": (of_torchvision("efficientnet_b0"), 16 * 2, 1 + 4 + 15 * 5 + 2),
    "torchvision vit": (lambda: torchvision.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10), 2, 1 + 2 * 3 + 1),
}
