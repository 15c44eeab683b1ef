"""kimi_k2: Moonshot's Kimi K2, which is a deepseek_v3 under a name of its own, so that programs may
know it; it is written under the name that they all know."""

from __future__ import annotations

from dataclasses import replace

from mlxedge.models import deepseek_v3
from mlxedge.models.spec import Config


def _adopt(config: Config) -> Config:
    named = {"model_type": "deepseek_v3", "architectures": [deepseek_v3.DENSE.architecture]}
    # Code of its own is not needed under that name.
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    return deepseek_v3.DENSE.adopts(kept | named)


SPEC = replace(
    deepseek_v3.DENSE, model_type="kimi_k2", adopts=_adopt, reads=lambda metadata: False
).spec()
