"""Shapes of the gradients of four models, built in code."""

from __future__ import annotations

Shape = tuple[int, ...]


def small() -> list[Shape]:
    """A recurrent network for teaching, 6 tensors."""
    return [(50, 10), (50, 50), (50,), (50,), (10, 50), (10,)]


def lstm() -> list[Shape]:
    """An LSTM language model: vocabulary 1000, embedding 128, two layers of 256."""
    shapes: list[Shape] = [(1000, 128)]
    for inputs in (128, 256):
        shapes += [(1024, inputs), (1024, 256), (1024,), (1024,)]
    return [*shapes, (1000, 256), (1000,)]


def resnet50() -> list[Shape]:
    """ResNet-50, 161 tensors, 25.6 million elements."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, channels, 1, 1))
            for convolution in convolutions:
                shapes += [convolution, convolution[:1], convolution[:1]]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> list[Shape]:
    """GPT-2 124M, 148 tensors."""
    wide = 768
    layer: list[Shape] = [
        *[(wide,), (wide,), (3 * wide, wide), (3 * wide,), (wide, wide), (wide,)],
        *[(wide,), (wide,), (4 * wide, wide), (4 * wide,), (wide, 4 * wide), (wide,)],
    ]
    return [(50257, wide), (1024, wide), *(layer * 12), (wide,), (wide,)]


SETS = {"small": small, "lstm": lstm, "resnet50": resnet50, "gpt2": gpt2}
