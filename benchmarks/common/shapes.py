"""Shapes of the gradients of models, built in code."""

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


def gpt2(
    layers: int = 12, wide: int = 768, vocabulary: int = 50257, positions: int = 1024
) -> list[Shape]:
    """GPT-2, 12 tensors a layer and 4; by default that of 124M."""
    layer: list[Shape] = [
        *[(wide,), (wide,), (3 * wide, wide), (3 * wide,), (wide, wide), (wide,)],
        *[(wide,), (wide,), (4 * wide, wide), (4 * wide,), (wide, 4 * wide), (wide,)],
    ]
    return [(vocabulary, wide), (positions, wide), *(layer * layers), (wide,), (wide,)]


def gpt2_xl() -> list[Shape]:
    """GPT-2 XL, 580 tensors, 1.56e9 elements."""
    return gpt2(layers=48, wide=1600)


def llama3(
    layers: int = 32,
    wide: int = 4096,
    narrow: int = 1024,
    inner: int = 14336,
    vocabulary: int = 128256,
) -> list[Shape]:
    """Llama 3, 9 tensors a layer and 3; by default that of 8B, 8.03e9 elements.

    Args:
        layers: How many there are.
        wide: Size of the residual stream, and of all queries.
        narrow: Size of all keys, and of all values.
        inner: Size inside a feed-forward part.
        vocabulary: Rows of the embedding, and of the head, which is not tied to it.
    """
    layer: list[Shape] = [
        *[(wide, wide), (narrow, wide), (narrow, wide), (wide, wide)],
        *[(inner, wide), (inner, wide), (wide, inner), (wide,), (wide,)],
    ]
    return [(vocabulary, wide), *(layer * layers), (wide,), (vocabulary, wide)]


def tiny(count: int = 1000) -> list[Shape]:
    """Many vectors of 1 to 256 elements, which cost the host more than the device."""
    return [(1 + 37 * place % 256,) for place in range(count)]


SETS = {"small": small, "lstm": lstm, "resnet50": resnet50, "gpt2": gpt2}
