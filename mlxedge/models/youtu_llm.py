"""youtu_llm: what youtu is called by mlx-lm, and was by Tencent's own code."""

from mlxedge.models.youtu import OTHER as SPEC

__all__ = ["SPEC"]
