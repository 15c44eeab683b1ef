"""Latent attention to the positions that an indexer picks: ``index_topk`` of them, by scores of
small heads of its own (DeepSeek Sparse Attention, in DeepSeek-V3.2).

Up to a context of that many positions all are picked, and it is latent attention as it is; that is
as far as it is computed here, and the indexer's own products are left out. Its matrices share the
inputs of others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlxedge.models.mixers import mla
from mlxedge.models.mixers.mla import Latent, record

if TYPE_CHECKING:
    from mlxedge.models.shape import Shape

__all__ = ["groups", "record", "settings", "sizes"]

_INDEXER = "self_attn.indexer."
#: Those that see what the block sees, and the one that sees the latent of queries.
_FIRST = (f"{_INDEXER}wk", f"{_INDEXER}weights_proj")
_SECOND = (f"{_INDEXER}wq_b",)


def settings(config: Mapping[str, Any]) -> Latent:
    return replace(mla.settings(config), most=int(config["index_topk"]))


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    heads, size = config["index_n_heads"], config["index_head_dim"]
    return mla.sizes(config) | {"index": size, "index_heads": heads, "index_query": heads * size}


def groups(shape: Shape, layer: int) -> list[tuple[str, ...]]:
    first, second, *others = mla.groups(shape, layer)
    return [(*first, *_FIRST), (*second, *_SECOND), *others]
