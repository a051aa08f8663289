"""Patches and pixels: the Vision Transformer, neighbourhoods, and convolution as attention."""

from __future__ import annotations

from typing import Any

import pytest
import saccade
import torch
from saccade.nn import ConvolutionalAttention, PatchEmbedding, PixelAttention, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("one_thread")


# Convolution is attention

CONVOLUTIONS: dict[str, Any] = {
    "3x3": {"kernel_size": 3},
    "3x3-padded": {"kernel_size": 3, "padding": 1},
    "5x5-padded": {"kernel_size": 5, "padding": 2},
    "even-stride": {"kernel_size": 2, "stride": 2},
    "rectangle": {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 2)},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "1x1-no-bias": {"kernel_size": 1, "bias": False},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_attention_equals_convolution_to_rounding(name: str, dtype: torch.dtype) -> None:
    conv = nn.Conv2d(3, 4, **CONVOLUTIONS[name], dtype=dtype)
    layer = ConvolutionalAttention.of(conv)
    images = torch.randn(2, 3, 7, 10, dtype=dtype, requires_grad=True)
    found, expected = layer(images), conv(images)
    # Both round: a few parts of the sum of the absolute values.
    weight, bias = conv.weight.abs(), None if conv.bias is None else conv.bias.abs()
    size = F.conv2d(images.abs(), weight, bias, conv.stride, conv.padding, conv.dilation)
    assert bool(((found - expected).abs() <= 3 * torch.finfo(dtype).eps * size).all())
    weight = torch.randn_like(found)
    inputs = [(images, m.weight) for m in (layer, conv)]
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), inputs[0]),
        torch.autograd.grad((expected * weight).sum(), inputs[1]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_large_images_keep_their_places() -> None:
    """Squares of places reach thousands: the right pixel must win all the same, in half precision too."""
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    images = torch.randn(1, 1, 48, 40)
    layer = ConvolutionalAttention.of(conv)
    torch.testing.assert_close(layer(images), conv(images))
    for dtype in (torch.bfloat16, torch.float16):
        half = images.to(dtype)
        torch.testing.assert_close(layer(half), conv(half.float()).to(dtype))


def test_the_quadratic_encoding_is_the_papers() -> None:
    layer = ConvolutionalAttention(1, 1, 3, alpha=0.3, dtype=torch.float64)
    q, k = layer._features((2, 3), (4, 5), None, torch.float64)
    weights = torch.softmax(q @ k.transpose(-1, -2), -1)[0]
    for h, shift in enumerate(layer.shift):
        for n in range(6):
            at = torch.tensor([n // 3, n % 3]) + shift
            logits = torch.stack(
                [-0.3 * ((torch.tensor([j // 5, j % 5]) - at) ** 2).sum() for j in range(20)]
            )
            torch.testing.assert_close(weights[h, n], torch.softmax(logits, 0))


def test_it_can_learn_where_to_look() -> None:
    """From a blurred start the shift of one head finds the pixel that another convolution reads."""
    images = torch.randn(16, 1, 6, 6)
    target = images[:, :, 1:, 1:]
    layer = ConvolutionalAttention(1, 1, 1, padding=0, bias=False, alpha=0.7)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.shift.fill_(0.3)
    optimizer = torch.optim.Adam([layer.shift, layer.alpha], lr=0.05)
    for _ in range(120):
        loss = (layer(images)[:, :, :5, :5] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(layer.shift, torch.ones(1, 2), rtol=0, atol=0.1)
    assert layer.alpha > 1.5


def test_its_state_is_a_convolutions() -> None:
    conv = nn.Conv2d(2, 3, 3)
    layer = ConvolutionalAttention(2, 3, 3)
    missing = layer.load_state_dict(conv.state_dict(), strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) == {"shift", "alpha"}
    with pytest.raises(ValueError, match="groups"):
        ConvolutionalAttention.of(nn.Conv2d(2, 2, 3, groups=2))
    with pytest.raises(ValueError, match="padding"):
        ConvolutionalAttention(2, 2, 3, padding="same")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 channels"):
        layer(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="kernel"):
        layer(torch.zeros(1, 2, 2, 8))


# Pixels


def naive(module: PixelAttention, images: Tensor) -> Tensor:
    """From the definition, with the weights laid out."""
    n, c, height, width = images.shape
    rows = images.flatten(2).transpose(1, 2)
    place = torch.stack([torch.arange(height * width) // width, torch.arange(height * width) % width], -1)
    apart = (place[:, None] - place).abs()
    if module.radius is None:
        hidden = torch.zeros(height * width, height * width, dtype=torch.bool)
    else:
        reach = torch.tensor(module.radius) * module.dilation
        hidden = ~((apart <= reach) & (apart % module.dilation == 0)).all(-1)
    plain = nn.MultiheadAttention(c, module.attention.num_heads, batch_first=True, dtype=images.dtype)
    plain.load_state_dict(module.attention.state_dict())
    return plain(rows, rows, rows, attn_mask=hidden)[0].transpose(1, 2).view(n, c, height, width)


@pytest.mark.parametrize(("radius", "dilation"), [(None, 1), (1, 1), ((0, 3), 1), (2, 2), (0, 1), (99, 1)])
@pytest.mark.parametrize("size", [(5, 10), (1, 7), (8, 8)])
def test_pixels_attend_to_their_neighbourhoods(radius: Any, dilation: int, size: tuple[int, int]) -> None:
    module = PixelAttention(6, 2, radius, dilation=dilation, dtype=torch.float64)
    images = torch.randn(2, 6, *size).double().requires_grad_()
    found, expected = module(images), naive(module, images)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    a, b = (torch.autograd.grad((x * weight).sum(), images)[0] for x in (found, expected))
    torch.testing.assert_close(a, b)


def test_neighbourhoods_are_kept_a_few() -> None:
    module = PixelAttention(4, 1, 1)
    first = module.neighbourhood(3, 4)
    assert module.neighbourhood(3, 4) is first
    for n in range(20):
        module.neighbourhood(1, n + 1)
    assert len(module._graphs) == 8
    with pytest.raises(ValueError, match="images"):
        module(torch.zeros(4, 3, 3))


# Patches


def test_patches_are_cut_by_rows() -> None:
    embed = PatchEmbedding((2, 3), 2, 5)
    images = torch.randn(2, 2, 4, 9)
    rows = embed(images)
    assert rows.shape == (2, 6, 5)
    kernel = embed.projection.weight.flatten(1)
    for n in range(6):
        y, x = n // 3 * 2, n % 3 * 3
        patch = images[:, :, y : y + 2, x : x + 3].flatten(1)
        torch.testing.assert_close(rows[:, n], patch @ kernel.t() + embed.projection.bias)
    with pytest.raises(ValueError, match="multiple of the patch"):
        embed(torch.zeros(1, 2, 5, 9))
    with pytest.raises(ValueError, match="2 channels"):
        embed(torch.zeros(1, 3, 4, 9))


def test_the_vision_transformer_is_torchs_encoder_on_patches() -> None:
    model = VisionTransformer(16, 4, 2, 2, 8, 3, 24, in_channels=1)
    images = torch.randn(2, 1, 16, 16)
    layer = nn.TransformerEncoderLayer(8, 2, 24, 0.0, F.gelu, batch_first=True, norm_first=True)
    plain = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)
    plain.load_state_dict(model.encoder.state_dict())
    x = torch.cat([model.class_token.expand(2, -1, -1), model.patches(images)], 1) + model.position
    torch.testing.assert_close(model(images), model.head(plain(x)[:, 0]))
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_vit_b16_has_197_tokens() -> None:
    model = VisionTransformer(224, 16, 1, 2, 16, 10)
    assert model.features(torch.randn(1, 3, 224, 224)).shape == (1, 197, 16)


def test_positions_are_interpolated() -> None:
    model = VisionTransformer(8, 2, 1, 2, 8, 3, in_channels=1)
    assert model.positions((4, 4)) is model.position
    with torch.no_grad():  # a position that grows along the rows does so in the larger grid
        slope = torch.arange(4.0).repeat_interleave(4)
        model.position[0, 1:] = slope[:, None]
    wide = model.positions((8, 6))
    assert wide.shape == (1, 49, 8) and torch.equal(wide[:, 0], model.position[:, 0])
    rows = wide[0, 1:, 0].view(8, 6)
    assert bool((rows[1:] > rows[:-1]).all()) and torch.allclose(rows[:, :1], rows, atol=1e-5)
    assert model(torch.randn(2, 1, 16, 12)).shape == (2, 3)


def test_pixel_and_patch_attention_take_the_modules_options() -> None:
    model = VisionTransformer((8, 4), (2, 2), 1, 4, 8, 3, in_channels=1, num_kv_heads=2, window=(2, 2))
    assert model(torch.randn(1, 1, 8, 4)).shape == (1, 3)
    assert PixelAttention(8, 2, 1, qk_norm=True)(torch.randn(1, 8, 3, 3)).shape == (1, 8, 3, 3)
    with pytest.raises(ValueError, match="image_size"):
        VisionTransformer((8, 4, 2), 2, 1, 1, 8, 3)  # type: ignore[arg-type]
    assert isinstance(saccade.patterns.grid2d(2, 2, 1), saccade.Graph)
