"""Shapes of the gradients of models."""

from __future__ import annotations

Shape = tuple[int, ...]


def small() -> list[Shape]:
    """Return the shapes of a small recurrent network, 6 tensors."""
    return [(50, 10), (50, 50), (50,), (50,), (10, 50), (10,)]


def lstm() -> list[Shape]:
    """Return the shapes of an LSTM: vocabulary 1000, embedding 128, two layers of 256."""
    shapes: list[Shape] = [(1000, 128)]
    for inputs in (128, 256):
        shapes += [(1024, inputs), (1024, 256), (1024,), (1024,)]
    return [*shapes, (1000, 256), (1000,)]


def resnet50() -> list[Shape]:
    """Return the shapes of ResNet-50, 161 tensors, 25.6 million elements."""
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
    """Return the shapes of GPT-2, 12 tensors a layer and 4 others; by default GPT-2 124M."""
    layer: list[Shape] = [
        *[(wide,), (wide,), (3 * wide, wide), (3 * wide,), (wide, wide), (wide,)],
        *[(wide,), (wide,), (4 * wide, wide), (4 * wide,), (wide, 4 * wide), (wide,)],
    ]
    return [(vocabulary, wide), (positions, wide), *(layer * layers), (wide,), (wide,)]


def gpt2_xl() -> list[Shape]:
    """Return the shapes of GPT-2 XL, 580 tensors, 1.56e9 elements."""
    return gpt2(layers=48, wide=1600)


def llama3(
    layers: int = 32,
    wide: int = 4096,
    narrow: int = 1024,
    inner: int = 14336,
    vocabulary: int = 128256,
) -> list[Shape]:
    """Return the shapes of Llama 3, 9 tensors a layer and 3 others; by default Llama 3 8B.

    Args:
        layers: Number of layers.
        wide: Size of the residual stream and of all queries.
        narrow: Size of all keys and of all values.
        inner: Size inside a feed-forward layer.
        vocabulary: Rows of the embedding and of the head, which are not tied.
    """
    layer: list[Shape] = [
        *[(wide, wide), (narrow, wide), (narrow, wide), (wide, wide)],
        *[(inner, wide), (inner, wide), (wide, inner), (wide,), (wide,)],
    ]
    return [(vocabulary, wide), *(layer * layers), (wide,), (vocabulary, wide)]


def tiny(count: int = 1000) -> list[Shape]:
    """Return many vectors of 1 to 256 elements, which cost the host more than the device."""
    return [(1 + 37 * index % 256,) for index in range(count)]


SETS = {"small": small, "lstm": lstm, "resnet50": resnet50, "gpt2": gpt2}
