"""qwen2_5_vl_text: the language model of Qwen 2.5 VL: that of Qwen 2 VL."""

from __future__ import annotations

from mlxedge.models.qwen2_vl_text import spec_of

SPEC = spec_of("qwen2_5_vl_text")
