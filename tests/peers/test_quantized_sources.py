"""Quantized checkpoints decode to what the libraries that write them decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles.quantized_folder import read_weights, write_folder

X = "model.layers.0.mlp.up_proj"
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def weights(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def as_f32(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(F32).numpy()


def compress(settings: dict[str, Any], weight: torch.Tensor, dtype: torch.dtype) -> Any:
    """What compressed-tensors stores of ``weight``, what it decodes that to, and its format."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import (
        calculate_qparams,
        generate_gparam,
    )

    args = QuantizationArgs(**settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    rows, cols = weight.shape
    if args.strategy == "block":
        height, width = args.block_structure
        grouped = weight.reshape(rows // height, height, cols // width, width).transpose(1, 2)
        grouped = grouped.reshape(rows // height, cols // width, -1)
    else:
        size = {"channel": cols, "tensor": cols}.get(str(args.strategy), args.group_size)
        grouped = weight.reshape(rows, cols // size, size)
        if args.strategy == "tensor":
            grouped = weight.reshape(1, 1, -1)
    low, high = grouped.amin(-1), grouped.amax(-1)
    state: dict[str, torch.Tensor] = {}
    overall = None
    if args.strategy == "tensor_group":
        overall = generate_gparam(low.amin(), high.amax())
        state["weight_global_scale"] = overall.reshape(1)
    scale, zero = calculate_qparams(low, high, args, global_scale=overall)
    state |= {"weight": weight, "weight_scale": scale.to(dtype)}
    if not args.symmetric:
        state["weight_zero_point"] = zero
    if args.strategy == "tensor":
        state["weight_scale"] = state["weight_scale"].reshape(1)
    kind = infer_module_format(torch.nn.Linear, scheme).value
    coder = BaseCompressor.get_value_from_registry(kind)
    stored = coder.compress(state, scheme)
    if overall is None:
        return stored, as_f32(coder.decompress(dict(stored), scheme)["weight"]), kind
    # decompress() computes in bf16; the same steps in f32:
    codes = unpack_fp4_from_uint8(stored["weight_packed"], rows, cols, dtype=F32)
    scales = stored["weight_scale"].to(F32)
    return stored, as_f32(dequantize(codes, scales, None, args, F32, overall)), kind


INT = {"type": "int", "strategy": "group", "group_size": 32}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "int4-group": (INT | {"num_bits": 4, "symmetric": True}, "affine-4bit-g32"),
    "int4-asymmetric": (INT | {"num_bits": 4, "symmetric": False}, "affine-4bit-g32"),
    "int4-g128": (INT | {"num_bits": 4, "symmetric": True, "group_size": 128}, "affine-4bit-g128"),
    "int4-channel": (
        {"type": "int", "num_bits": 4, "symmetric": True, "strategy": "channel"},
        "affine-4bit-g128",
    ),
    "int8-packed": (INT | {"num_bits": 8, "symmetric": False}, "affine-8bit-g32"),
    "int3": (INT | {"num_bits": 3, "symmetric": True}, "affine-3bit-g32"),
    "int7": (INT | {"num_bits": 7, "symmetric": True}, "f32"),
    "int8-channel": (
        {"type": "int", "num_bits": 8, "symmetric": True, "strategy": "channel"},
        "affine-8bit-g128",
    ),
    "int8-channel-asymmetric": (
        {"type": "int", "num_bits": 8, "symmetric": False, "strategy": "channel"},
        "affine-8bit-g128",
    ),
    "int8-tensor": (
        {"type": "int", "num_bits": 8, "symmetric": True, "strategy": "tensor"},
        "affine-8bit-g128",
    ),
    "fp8-channel": (
        {"type": "float", "num_bits": 8, "symmetric": True, "strategy": "channel"},
        "f32",
    ),
    "fp8-tensor": (
        {"type": "float", "num_bits": 8, "symmetric": True, "strategy": "tensor"},
        "f32",
    ),
    "fp8-block": (
        {
            "type": "float",
            "num_bits": 8,
            "symmetric": True,
            "strategy": "block",
            "block_structure": [16, 64],
        },
        "f32",
    ),
    "nvfp4": (
        {
            "type": "float",
            "num_bits": 4,
            "symmetric": True,
            "strategy": "tensor_group",
            "group_size": 16,
        },
        "f32",
    ),
    "mxfp4": (
        {
            "type": "float",
            "num_bits": 4,
            "symmetric": True,
            "strategy": "group",
            "group_size": 32,
            "scale_dtype": "torch.uint8",
        },
        "mlx-mxfp4",
    ),
    "mxfp8": (
        {
            "type": "float",
            "num_bits": 8,
            "symmetric": True,
            "strategy": "group",
            "group_size": 32,
            "scale_dtype": "torch.uint8",
        },
        "mlx-mxfp8",
    ),
}


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("case", CASES)
def test_compressed_tensors(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    settings, encoding = CASES[case]
    stored, expected, kind = compress(settings, weights(48, 256), dtype)
    rules = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": settings}},
    }
    folder = write_folder(tmp_path, rules, {f"{X}.{name}": t for name, t in stored.items()})
    ((name, (found, got)),) = read_weights(folder).items()
    assert name == f"{X}.weight"
    if dtype is F32 and encoding.startswith("affine"):
        encoding = "f32"  # with scales of 24 bits a bias could not be exact
    assert found == encoding
    # The library computes in the dtype of the scales; ours is that product before it is rounded.
    wide = dtype is F32 or kind in ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
    rounded = torch.from_numpy(got).to(F32 if wide else dtype)
    np.testing.assert_array_equal(as_f32(rounded), expected)
    assert np.abs(expected).max() > 1


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [64, 128])
def test_bitsandbytes_4_bits(tmp_path: Path, kind: str, nested: bool, block: int) -> None:
    from bitsandbytes import functional as bnb

    # Its CPU kernel is wrong where a block goes over the end of a row (0.50.2).
    weight = weights(40, 384)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=block, compress_statistics=nested, quant_type=kind
    )
    expected = bnb.dequantize_4bit(packed, state)
    arrays = {f"{X}.weight": packed}
    arrays |= {f"{X}.weight.{name}": t for name, t in state.as_dict(packed=True).items()}
    folder = write_folder(tmp_path, {"quant_method": "bitsandbytes", "load_in_4bit": True}, arrays)
    found = read_weights(folder)
    assert list(found) == [f"{X}.weight"]
    # The library's own kernel may multiply and add the nested scales in one rounding.
    np.testing.assert_allclose(found[f"{X}.weight"][1], expected.numpy(), rtol=3e-7)
    if not nested:
        np.testing.assert_array_equal(found[f"{X}.weight"][1], expected.numpy())
    assert np.abs(found[f"{X}.weight"][1] - weight.numpy()).max() < 1.2


def test_bitsandbytes_8_bits(tmp_path: Path) -> None:
    from bitsandbytes import functional as bnb

    weight = weights(40, 320)
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.to(F16))
    expected = bnb.int8_vectorwise_dequant(codes, scales)
    arrays = {
        f"{X}.weight": codes,
        f"{X}.SCB": scales,
        f"{X}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    folder = write_folder(tmp_path, {"quant_method": "bitsandbytes", "load_in_8bit": True}, arrays)
    ((_, (found, got)),) = read_weights(folder).items()
    assert found == "f32"
    np.testing.assert_array_equal(got, expected.to(F32).numpy())


def test_bitnet(tmp_path: Path) -> None:
    from transformers.integrations.bitnet import pack_weights

    codes = torch.randint(-1, 2, (64, 96), generator=torch.Generator().manual_seed(1))
    scale = torch.tensor([37.5], dtype=BF16)
    arrays = {f"{X}.weight": pack_weights(codes.clone().float()), f"{X}.weight_scale": scale}
    rules = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    folder = write_folder(tmp_path / "divides", rules, arrays)
    ((_, (_, got)),) = read_weights(folder).items()
    np.testing.assert_array_equal(got, codes.numpy().astype(np.float32) / np.float32(37.5))
    rules |= {"linear_class": "autobitlinear", "quantization_mode": "offline"}
    folder = write_folder(tmp_path / "multiplies", rules, arrays)
    ((_, (_, got)),) = read_weights(folder).items()
    np.testing.assert_array_equal(got, codes.numpy().astype(np.float32) * np.float32(37.5))


@pytest.mark.parametrize("scales", [F32, BF16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("shape", [(256, 384), (3, 256, 384)], ids=["matrix", "stack"])
@pytest.mark.parametrize("block", [(128, 128), (64, 32), (256, 384), (1, 384)])
def test_fp8_blocks(
    tmp_path: Path, scales: torch.dtype, shape: tuple[int, ...], block: tuple[int, int]
) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    generator = torch.Generator().manual_seed(2)
    codes = torch.randn(shape, generator=generator).mul(50).to(torch.float8_e4m3fn)
    grid = (*shape[:-2], shape[-2] // block[0], shape[-1] // block[1])
    scale = (torch.rand(grid, generator=generator) + 0.1).to(scales)
    expected = Fp8Dequantize(None)._dequantize_one(codes, scale, output_dtype=F32)
    name = f"{X}.weight"
    rules = {"quant_method": "fp8", "weight_block_size": list(block)}
    folder = write_folder(
        tmp_path,
        rules,
        {name: codes, f"{name}_scale_inv": scale, f"{X}.activation_scale": torch.ones(1)},
    )
    found = read_weights(folder)
    assert list(found) == [name]
    np.testing.assert_array_equal(found[name][1], expected.numpy())


def test_mxfp4_of_gpt_oss(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (3, 24, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 130, (3, 24, 4), generator=generator, dtype=torch.uint8)
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    arrays = {
        f"{stack}_blocks": blocks,
        f"{stack}_scales": scales,
        f"{stack}_bias": torch.ones(3, 24, dtype=BF16),
    }
    found = read_weights(write_folder(tmp_path, {"quant_method": "mxfp4"}, arrays))
    assert list(found) == [f"{stack}.weight", f"{stack}_bias"]
    expected = convert_moe_packed_tensors(blocks, scales, dtype=F32)  # [experts, in, out]
    encoding, got = found[f"{stack}.weight"]
    assert encoding == "mlx-mxfp4"
    np.testing.assert_array_equal(got, expected.transpose(1, 2).numpy())
