"""Records of benchmarks as ``mlxedge bench`` makes them, of runs that never took place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxedge.bench.measure import Measurement, Run, Settings, Test
from mlxedge.bench.record import describe_model, make_record
from mlxedge.bench.sensors import Conditions
from mlxedge.inspect import Inspection, TensorInfo

DEVICE: dict[str, Any] = {
    "os": "macOS 26.1",
    "machine": "arm64",
    "cpu": "Apple M2 Max",
    "model": "Mac14,6",
    "cores": 12,
    "performance_cores": 8,
    "usable_processors": 12,
    "gpu": "Apple M2 Max",
    "gpu_cores": 30,
    "memory_bytes": 32 << 30,
    "low_power_mode": False,
    "bandwidth_gb_s": 400.0,
}
CONDITIONS = Conditions("AC", 41.5, "nominal")


def record(
    prefill: Sequence[float] = (0.5, 0.4),
    decode: Sequence[float] = (2.0,),
    *,
    device: dict[str, Any] | None = None,
    joules: float | None = None,
    **sections: dict[str, Any],
) -> dict[str, Any]:
    """Of runs that took so many seconds: 100 prompt tokens, 20 generated ones. ``sections`` are
    laid over those of the record."""
    found = Inspection(
        name="m",
        kind="gguf",
        files={"m-q4_k_m.gguf": 160},
        tensors=[TensorInfo("a", (2, 256), "q4_k", 288)],
        metadata={},
        quantization="Q4_K_M",
        path=Path("m-q4_k_m.gguf"),
    )
    tests = []
    if prefill:
        runs = tuple(Run(s, 1.0 * i, (), joules) for i, s in enumerate(prefill))
        tests.append(Test("prefill", 100, 0, runs))
    if decode:
        runs = tuple(Run(s, 9.0 + i, (s / 20,) * 20, joules) for i, s in enumerate(decode))
        tests.append(Test("decode", 20, 0, runs))
    measured = Measurement(
        engine="numpy",
        build="mlxedge 0.1.0",
        processor="cpu",
        threads=2,
        settings=Settings(100 if prefill else 0, 20 if decode else 0, repeats=2),
        load_seconds=0.25,
        peak_memory_bytes=None,
        peak_gpu_memory_bytes=None,
        energy_source="a meter" if joules is not None else None,
        before=CONDITIONS,
        after=CONDITIONS,
        tests=tuple(tests),
    )
    about = describe_model(found, "ab" * 32, "cd" * 32) | {"bytes_per_token": 288}
    made = make_record(about, measured, DEVICE | (device or {}))
    for name, values in sections.items():
        made[name] |= values
    return made


def speeds(mean: float, spread: float, count: int = 5) -> list[float]:
    """``count`` values about a mean, evenly within ``spread`` of it either way, out of order."""
    steps = [mean * (1 + spread * (2 * i / (count - 1) - 1)) for i in range(count)]
    return steps[::2] + steps[1::2]
