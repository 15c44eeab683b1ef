"""What architectures of state spaces share: how worlds store their tensors, and all else of those
without attention and MLP."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mlxedge import gguf_values as gv
from mlxedge.errors import TokenizerError, UnsupportedModelError
from mlxedge.models.names import names
from mlxedge.models.recasts import Recast, Reshape, Values
from mlxedge.models.rope_files import shortest
from mlxedge.models.spec import Config, ModelSpec, Name
from mlxedge.models.windows import no_windows
from mlxedge.models.wiring import Wiring

if TYPE_CHECKING:
    import numpy as np

WIRING = Wiring(attention_norm="norm", mlp_norm=None, mlp="none")
#: What llama.cpp's converter takes for a context without a limit.
ENDLESS = 1 << 20
EPSILON = "layer_norm_epsilon"
_MODULE = "model.layers.{i}.mamba."
_KERNEL = f"{_MODULE}conv1d.weight"
#: How files call the modules of models without attention.
MODULES = {
    _MODULE: "backbone.layers.{i}.mixer.",
    "model.layers.": "backbone.layers.",
    "model.embed_tokens.": "backbone.embeddings.",
    "model.norm.": "backbone.norm_f.",
}


#: Codestral Mamba's files have all within a module.
_SPELLINGS = ((r"^model\.backbone\.", "backbone."), (r"^model\.lm_head\.", "lm_head."))


def rates(a_log: np.ndarray) -> np.ndarray:
    """A of its logarithm."""
    import numpy as np

    return -np.exp(a_log)


def _logs(values: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.log(-values)


def in_gguf(part: str, gguf: str, *steps: Any) -> Recast:
    """A tensor of the mixer that GGUF has in another form."""
    return Recast("gguf", (f"{_MODULE}{part}",), (f"blk.{{i}}.{gguf}",), steps)


#: The kernel of a channel: ``[channels, 1, width]``, in GGUF ``[channels, width]``, in MLX
#: ``[channels, width, 1]``.
KERNEL = (
    in_gguf("conv1d.weight", "ssm_conv1d.weight", Reshape(lambda shape: (shape[0], shape[2]))),
    Recast("mlx", (_KERNEL,), (_KERNEL,), (Reshape(lambda shape: (shape[0], shape[2], 1)),)),
)
#: GGUF has A itself.
RATES = Values(rates, _logs)


def whole_numbers(config: Config, least: int, *keys: str) -> None:
    """Raise UnsupportedModelError for keys that are none."""
    wrong = [k for k in keys if type(config.get(k)) is not int or not least <= config[k] < 1 << 31]
    if wrong:
        given = ", ".join(f"{key} ({str(config.get(key, 'absent'))[:40]!r})" for key in wrong)
        raise UnsupportedModelError(f"the config needs positive whole numbers for {given}")


def only_silu(config: Config) -> None:
    """Raise UnsupportedModelError for another activation."""
    if config.get("hidden_act") not in (None, "silu", "swish"):
        raise UnsupportedModelError(
            f"{config['model_type']} with another hidden_act than silu is not supported"
        )


def stored(name: Name, modules: Mapping[str, str]) -> Name:
    """With the name that files have for it, where the first of ``modules`` that fits is another."""
    for module, own in modules.items():
        if name.hf.startswith(module):
            other = own + name.hf.removeprefix(module)
            return replace(name, stored=other, mlx=other)
    return name


def namer(layers: Callable[[Config], Collection[int]] | None) -> Callable[..., Name]:
    """Makes the names of a mixer's tensors in those layers, or in all: of its part there, in GGUF,
    and the words of its shape; ``key`` of the config says whether it is there."""

    def own(part: str, gguf: str, *shape: str, key: str = "", exact: bool = False) -> Name:
        given = (lambda config: bool(config[key])) if key else (lambda config: True)
        return Name(
            f"{_MODULE}{part}",
            f"blk.{{i}}.{gguf}",
            shape,
            present=given,
            layers=layers,
            exact=exact,
        )

    return own


@dataclass(frozen=True)
class Spaces:
    """A ``ModelSpec`` of an architecture of state spaces alone.

    ``mixer`` names its mixer, ``tensors`` are that one's; ``adopt`` also gives the sizes of an
    attention and an MLP that are not there; ``metadata`` are the mixer's numbers in GGUF, ``back``
    makes the config's of them, with the hidden size.
    """

    model_type: str
    architecture: str
    mixer: str
    tensors: tuple[Name, ...]
    recasts: tuple[Recast, ...]
    adopt: Callable[[Config], Config]
    metadata: Callable[[Config], Mapping[str, int]]
    back: Callable[[Callable[[str], int], int], Config]
    objections: Callable[[Config, str], list[str]]
    extra: Callable[[Config], gv.Metadata] = lambda config: {}
    reads: Callable[[Mapping[str, gv.GgufValue]], bool] = lambda metadata: True

    def spec(self) -> ModelSpec:
        made = (*names(WIRING), *self.tensors)
        return ModelSpec(
            model_type=self.model_type,
            architecture=self.architecture,
            gguf_arch=self.mixer,
            names=tuple(stored(name, MODULES) for name in made if ".self_attn." not in name.hf),
            wiring=WIRING,
            attends=False,
            mixers=lambda config: (self.mixer,) * config["num_hidden_layers"],
            windows=no_windows,
            window=lambda config, runtime: None,
            ropes=lambda config: (None,) * config["num_hidden_layers"],
            epsilon=EPSILON,
            adopt=self._adopt,
            settle=self._settle,
            gguf_metadata=self._gguf_metadata,
            gguf_extra=lambda config: {},
            config_from_gguf=self._config_from_gguf,
            mlx_config=dict,
            objections=self._objections,
            recasts=self.recasts,
            spellings=_SPELLINGS,
            reads=self.reads,
        )

    def _adopt(self, config: Config) -> Config:
        whole_numbers(config, 1, "hidden_size")
        made = self.adopt({"max_position_embeddings": ENDLESS, EPSILON: 1e-5, **config})
        return {"tie_word_embeddings": False, **made}

    def _settle(self, config: Config) -> Config:
        only_silu(config)
        return {"time_step_rank": "auto", **config}

    def _gguf_metadata(self, config: Config) -> gv.Metadata:
        numbers = {
            "block_count": config["num_hidden_layers"],
            "context_length": config["max_position_embeddings"],
            "embedding_length": config["hidden_size"],
            "feed_forward_length": 0,
            "attention.head_count": 0,
            "attention.head_count_kv": 0,
            "vocab_size": config["vocab_size"],
            **self.metadata(config),
        }
        values = {key: gv.u32(value) for key, value in numbers.items()} | self.extra(config)
        values["attention.layer_norm_rms_epsilon"] = gv.f32(config[EPSILON])
        return {f"{self.mixer}.{key}": value for key, value in values.items()}

    def _config_from_gguf(
        self, metadata: Mapping[str, gv.GgufValue], extra: Mapping[str, np.ndarray]
    ) -> Config:
        def get(key: str) -> int:
            found = metadata.get(f"{self.mixer}.{key}")
            if found is None or type(found.value) is not int or found.value <= 0:
                raise UnsupportedModelError(
                    f"the GGUF metadata lacks a positive {self.mixer}.{key}: the file is incomplete"
                )
            return found.value

        vocab = metadata.get(f"{self.mixer}.vocab_size")
        tokens = metadata.get("tokenizer.ggml.tokens")
        if vocab is None and tokens is None:
            raise TokenizerError("the GGUF metadata says neither vocab_size nor the tokens")
        epsilon = metadata.get(f"{self.mixer}.attention.layer_norm_rms_epsilon")
        hidden = get("embedding_length")
        return {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "hidden_act": "silu",
            "hidden_size": hidden,
            "num_hidden_layers": get("block_count"),
            "max_position_embeddings": get("context_length"),
            EPSILON: 1e-5 if epsilon is None else shortest(epsilon.value),
            "vocab_size": vocab.value if vocab is not None else len(tokens.value if tokens else ()),
            "use_bias": False,
            "use_conv_bias": True,
            **self.back(get, hidden),
        }

    def _objections(self, config: Config, runtime: str) -> list[str]:
        found = self.objections(config, runtime)
        if runtime == "mlx" and config[EPSILON] != 1e-5:
            name = self.model_type
            found.append(f"mlx-lm's {name} has norms with 1e-5 before its blocks ({EPSILON})")
        return found
