"""What one file per ``model_type`` declares."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlxedge.errors import CorruptFileError, UnsupportedModelError
from mlxedge.gguf_values import GgufValue, Metadata
from mlxedge.models.experts import ROUTER, SHARED_GATE, Experts
from mlxedge.models.mixers import load_mixer
from mlxedge.models.recasts import Recast, World
from mlxedge.models.rope import Rope
from mlxedge.models.wiring import PRE_NORM, Factors, Heads, Wiring

if TYPE_CHECKING:
    import numpy as np

    from mlxedge.models.altup import AltUp

#: How the rows of a tensor are laid out in GGUF against Hugging Face. "rope_q" and "rope_k" stand
#: for the interleaved rotary order that llama.cpp's llama graph expects.
RowOrder = Literal["same", "rope_q", "rope_k"]

Config = dict[str, Any]
#: Tensors of zeros by their name in a world: their shape, and a canonical matrix that has their
#: input, if they are matrices.
Placeholders = dict[str, tuple[tuple[int, ...], str | None]]
#: Config keys for the number of layers that predict further tokens.
PREDICTING = ("num_nextn_predict_layers", "num_mtp_layers")
#: The module that holds them in some models.
_AHEAD = ("mtp.", "model.mtp.")


def attention_everywhere(config: Config) -> tuple[str, ...]:
    return ("attention",) * int(config["num_hidden_layers"])


def heads_everywhere(config: Config) -> tuple[Heads, ...]:
    """The same in all layers."""
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    size = int(config.get("head_dim") or config["hidden_size"] // heads)
    return (Heads(heads, kv_heads, size),) * int(config["num_hidden_layers"])


def one_width(config: Config) -> tuple[int, ...]:
    """``intermediate_size`` in all layers."""
    return (int(config["intermediate_size"]),) * int(config["num_hidden_layers"])


@dataclass(frozen=True)
class Name:
    """One tensor in all worlds; ``{i}`` stands for the layer.

    ``hf`` is the canonical name: Hugging Face's, but for stacks of experts. ``shape`` is in terms
    of ``ModelSpec.sizes`` and ``layer_sizes``; ``present(config)`` tells whether a model of that
    config has the tensor, ``layers(config)`` in which layers, if not in all. ``stored`` is the name
    in a Hugging Face folder where that differs, with ``{e}`` for the expert if each is a tensor of
    its own; ``mlx`` that in an MLX folder. ``offset`` is what GGUF adds to the values; ``exact``
    ones stay f32 whatever the others become. A ``listed`` one is a number of each layer that GGUF
    has in its metadata: ``gguf`` is then the key of an array and ``.{i}``.
    """

    hf: str
    gguf: str
    shape: tuple[str, ...]
    rows: RowOrder = "same"
    present: Callable[[Config], bool] = lambda config: True
    layers: Callable[[Config], Collection[int]] | None = None
    stored: str | None = None
    mlx: str | None = None
    offset: float = 0.0
    exact: bool = False
    listed: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """An architecture: its names, its metadata, its layout.

    Every ``config`` below is a normalised one (``mlxedge.models.normalise``).

    - ``gguf_metadata(config)``: the architecture's GGUF keys, without ``general.`` and
      ``tokenizer.``.
    - ``gguf_extra(config)``: tensors f32 that only GGUF has, by name (``rope_freqs.weight``).
    - ``config_from_gguf(metadata, extra)``: the way back; ``extra`` holds those tensors, f32.
    - ``by_tensors(config, names)``: that config with what only the names of a GGUF file's tensors
      tell.
    - ``mlx_config(config)``: the config.json that mlx-lm reads right.
    - ``hf_config(config)``: the config.json that transformers reads.
    - ``objections(config, format)``: why the runtime of ``format`` ("gguf", "mlx") cannot compute
      this model, or nothing.
    - ``window(config, format)``: up to how many tokens of context full attention, where that is all
      that the runtime of ``format`` has for this architecture, equals the model's own; ``None`` if
      always.
    - ``windows(config)``: the sliding window of each layer, 0 for none.
    - ``ropes(config)``: the rotary embedding of each layer, ``None`` for none.
    - ``mixers(config)``: what mixes positions in each layer (``mlxedge.models.mixers``).
    - ``heads(config)``: the heads of attention in each layer; ``widths(config)``: the width of its
      MLP; ``per_layer(config)``: that of the inputs that each layer has of its own beside the
      stream (``mlxedge.models.per_layer``), 0 for none.
    - ``altup(config)``: how several streams alternate (``mlxedge.models.altup``), ``None`` for one;
      ``sparsity(config)``: which part of each layer's gates is zero, 0 for none in particular.
    - ``factors(config)``: what scales and caps activations.
    - ``adopt(config)``: a config as it is found, under the keys that are read here, with the
      defaults that transformers has for this architecture.
    - ``settle(config)``: the config with the architecture's own keys spelled out, or
      UnsupportedModelError.
    - ``notes(config, format)``: what to know of the model in the runtime of ``format``.
    - ``words(config)``: further words of shapes and what they stand for.
    - ``placeholders(config, world)``: what a runtime wants in a file and computes nothing with.
    - ``recasts``: what a world stores otherwise than by name; the first that serves is written.
    - ``unused(name, config)``: whether a source tensor, by its name in Hugging Face or MLX folders,
      is one that nothing computes with; it is left out.
    - ``reads(metadata)``: whether a GGUF file of ``gguf_arch`` with this metadata is of this type,
      where several share the architecture.
    """

    model_type: str
    architecture: str
    gguf_arch: str
    names: tuple[Name, ...]
    gguf_metadata: Callable[[Config], Metadata]
    gguf_extra: Callable[[Config], dict[str, np.ndarray]]
    config_from_gguf: Callable[[Mapping[str, GgufValue], Mapping[str, np.ndarray]], Config]
    mlx_config: Callable[[Config], Config]
    objections: Callable[[Config, str], list[str]]
    window: Callable[[Config, str], int | None]
    windows: Callable[[Config], tuple[int, ...]]
    ropes: Callable[[Config], tuple[Rope | None, ...]]
    mixers: Callable[[Config], tuple[str, ...]] = attention_everywhere
    #: Whether there is attention. Without, ``adopt`` gives the sizes of one that is not there.
    attends: bool = True
    heads: Callable[[Config], tuple[Heads, ...]] = heads_everywhere
    widths: Callable[[Config], tuple[int, ...]] = one_width
    per_layer: Callable[[Config], int] = lambda config: 0
    altup: Callable[[Config], AltUp | None] = lambda config: None
    sparsity: Callable[[Config], tuple[float, ...]] = lambda config: ()
    words: Callable[[Config], dict[str, int]] = lambda config: {}
    placeholders: Callable[[Config, str], Placeholders] = lambda config, world: {}
    factors: Callable[[Config], Factors] = lambda config: Factors()
    #: The architecture in GGUF of a model of a config, where that is another one.
    archs: Callable[[Config], str | None] = lambda config: None
    #: Whether mlx-lm computes what is meant from a Hugging Face folder, too.
    mlx_reads_stored: bool = True
    hf_config: Callable[[Config], Config] = lambda config: config
    wiring: Wiring = PRE_NORM
    #: That of a config, where it differs.
    wires: Callable[[Config], Wiring] | None = None
    #: Whether a tied table stands twice in MLX folders, as the head as well.
    unties: bool = False
    #: The formats whose runtime does not have the architecture.
    lacks: tuple[str, ...] = ()
    unused: Callable[[str, Config], bool] = lambda name, config: False
    by_tensors: Callable[[Config, Container[str]], Config] = lambda config, names: config
    #: The config key of the norms' epsilon.
    epsilon: str = "rms_norm_eps"
    adopt: Callable[[Config], Config] = lambda config: config
    settle: Callable[[Config], Config] = lambda config: config
    reads: Callable[[Mapping[str, GgufValue]], bool] = lambda metadata: True
    notes: Callable[[Config, str], list[str]] = lambda config, format: []
    experts: Experts | None = None
    recasts: tuple[Recast, ...] = ()
    #: Whether layers that predict further tokens may follow the others; they are dropped.
    drops_predicting: bool = False
    #: What stands before the names of an MLX folder, whose config has ours as ``text_config``.
    mlx_prefix: str = ""
    #: GGUF tensors that ``config_from_gguf`` consumes.
    gguf_only: tuple[str, ...] = (
        "rope_freqs.weight",
        "rope_factors_long.weight",
        "rope_factors_short.weight",
    )
    #: How files may spell names otherwise than they are known here: patterns, and what stands for
    #: what they match.
    spellings: tuple[tuple[str, str], ...] = ()
    #: Source tensors that carry no weights (buffers) and are dropped.
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)

    @cached_property
    def _by_hf(self) -> list[tuple[re.Pattern[str], Name]]:
        return [(_pattern(n.hf), n) for n in self.names]

    @cached_property
    def _by_file(self) -> list[tuple[re.Pattern[str], Name]]:
        """By the names in Hugging Face and MLX folders that are not canonical."""
        return [(_pattern(other), n) for n in self.names for other in (n.stored, n.mlx) if other]

    @cached_property
    def _by_gguf(self) -> list[tuple[re.Pattern[str], Name]]:
        return [(_pattern(n.gguf), n) for n in self.names]

    def arch_of(self, config: Config) -> str:
        """The architecture that a GGUF file of this config says."""
        return self.archs(config) or self.gguf_arch

    def to_gguf(self, hf_name: str) -> tuple[str, RowOrder] | None:
        """The GGUF name and row order of a Hugging Face tensor, or ``None`` if it is unknown."""
        for pattern, name in self._by_hf:
            if match := pattern.fullmatch(hf_name):
                return name.gguf.format(**match.groupdict()), name.rows
        return None

    def from_gguf(self, gguf_name: str) -> tuple[str, RowOrder] | None:
        """The Hugging Face name and row order of a GGUF tensor, or ``None`` if it is unknown."""
        if self.recast_of("gguf", gguf_name) is not None:
            return gguf_name, "same"  # until it is recast
        for pattern, name in self._by_gguf:
            if match := pattern.fullmatch(gguf_name):
                return name.hf.format(**match.groupdict()), name.rows
        return None

    def recast_of(self, world: World, other: str) -> tuple[Recast, str] | None:
        """What a world's tensor is made by, and its layer."""
        for recast in self.recasts:
            layer = recast.layer_of(other, recast.other) if recast.world == world else None
            if layer is not None:
                return recast, layer
        return None

    def inputs_of(self, gguf_name: str) -> tuple[str, ...]:
        """The canonical matrices that have the input of a GGUF matrix; none if it is unknown."""
        if (found := self.recast_of("gguf", gguf_name)) is not None:
            recast, layer = found
            number = recast.at(layer, recast.other).index(gguf_name)
            names = recast.at(layer, recast.canonical)
            return tuple(names) if recast.keeps(number) else ()
        mapped = self.from_gguf(gguf_name)
        return () if mapped is None else (mapped[0],)

    def input_in_gguf(self, hf_name: str) -> tuple[str, ...]:
        """The GGUF matrices that have the input of a canonical one."""
        for recast in self.recasts:
            mine = recast.world == "gguf" and recast.written
            layer = recast.layer_of(hf_name, recast.canonical) if mine else None
            if layer is not None:
                others = recast.at(layer, recast.other)
                return tuple(own for n, own in enumerate(others) if recast.keeps(n))
        mapped = self.to_gguf(hf_name)
        return () if mapped is None else (mapped[0],)

    def stacked_in_gguf(self, gguf_name: str, config: Config) -> int:
        """How many matrices a GGUF tensor stacks that are one in the canonical one."""
        if (found := self.recast_of("gguf", gguf_name)) is None:
            return 1
        recast, layer = found
        return recast.matrices(recast.at(layer, recast.other).index(gguf_name), config)

    def listed(self, layers: int) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
        """Arrays of GGUF's metadata, by key, that hold tensors of one number: of each of
        ``layers`` its Hugging Face name and shape."""
        found = {}
        for name in self.names:
            if name.listed:
                shape = tuple(1 for _ in name.shape)
                found[name.gguf.removesuffix(".{i}")] = [
                    (name.hf.format(i=i), shape) for i in range(layers)
                ]
        return found

    def columns_in_gguf(self, hf_name: str, config: Config, count: int) -> np.ndarray | None:
        """Which of ``count`` columns of a canonical matrix stands in each place of the GGUF one, or
        ``None`` if they stay."""
        for recast in self.recasts:
            mine = recast.world == "gguf" and recast.written
            if mine and recast.layer_of(hf_name, recast.canonical) is not None:
                return recast.columns(config, count)
        return None

    def offset(self, hf_name: str) -> float:
        """What GGUF adds to the values of a Hugging Face tensor."""
        found = (name.offset for pattern, name in self._by_hf if pattern.fullmatch(hf_name))
        return next(found, 0.0)

    def to_mlx(self, hf_name: str, count: int) -> tuple[str, ...]:
        """The names in an MLX folder: as ``to_stored``."""
        return self._named(hf_name, "mlx", count)

    def to_stored(self, hf_name: str, count: int) -> tuple[str, ...]:
        """The names in a Hugging Face folder: one, or ``count`` for a stack of so many experts, or
        of whatever else is apart in files."""
        return self._named(hf_name, "stored", count)

    def _named(self, hf_name: str, world: Literal["mlx", "stored"], count: int) -> tuple[str, ...]:
        other = self._other(hf_name, world)
        if other is None:
            return (hf_name,)
        return tuple(other.format(e=e) for e in range(count)) if "{e}" in other else (other,)

    def _other(self, hf_name: str, world: Literal["mlx", "stored"]) -> str | None:
        for pattern, name in self._by_hf:
            if match := pattern.fullmatch(hf_name):
                found: str | None = getattr(name, world)
                i = match.groupdict().get("i", "")
                return None if found is None else found.replace("{i}", i)
        return None

    def spelt(self, name: str) -> str:
        """What files call ``name``, as it is known here."""
        for pattern, own in self.spellings:
            name = re.sub(pattern, own, name, count=1)
        return name

    def canonical(self, name: str, world: World = "stored") -> tuple[str, int | None]:
        """The canonical name of what a file of ``world`` calls ``name``, and for one expert of a
        stack its number. A name that is unknown, or of a tensor to be recast, stays as it is."""
        if self.recast_of(world, name) is not None:
            return name, None
        for pattern, known in self._by_file:
            if match := pattern.fullmatch(name):
                found = match.groupdict()
                expert = found.pop("e", None)
                return known.hf.format(**found), None if expert is None else int(expert)
        return name, None

    def is_norm(self, hf_name: str) -> bool:
        """Whether the tensor holds a norm's weights, also where each head has its own."""
        found = self.to_gguf(hf_name)
        return found is not None and found[0].endswith("_norm.weight")

    def is_exact(self, name: str) -> bool:
        """Whether the tensor stays f32 whatever the others become; of one that is recast the name
        is that of its world."""
        if any(known.exact and pattern.fullmatch(name) for pattern, known in self._by_hf):
            return True
        exact = (recast for recast in self.recasts if recast.exact)
        return any(recast.layer_of(name, recast.other) is not None for recast in exact)

    def is_router(self, hf_name: str) -> bool:
        """Whether the matrix chooses experts, or how much of the shared one counts."""
        return hf_name.endswith((f"{ROUTER}.weight", f"{SHARED_GATE}.weight"))

    def rank(self, hf_name: str) -> int | None:
        """How many dimensions the tensor has; ``None`` if it is unknown."""
        for pattern, name in self._by_hf:
            if pattern.fullmatch(hf_name):
                return len(name.shape)
        return None

    def expected(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Every tensor that a model of this config has, by Hugging Face name, with its shape."""
        size, own = self.sizes(config), self.layer_sizes(config)
        found: dict[str, tuple[int, ...]] = {}
        for name in self.names:
            if name.present(config):
                layers: Collection[int] = range(config["num_hidden_layers"])
                if name.layers is not None:
                    layers = sorted(name.layers(config))
                elif "{i}" not in name.hf:
                    layers = (0,)
                for i in layers:
                    words = size | own[i]
                    found[name.hf.format(i=i)] = tuple(words[word] for word in name.shape)
        return found

    def wired(self, config: Config) -> Wiring:
        return self.wiring if self.wires is None else self.wires(config)

    def layer_sizes(self, config: Config) -> list[dict[str, int]]:
        """By layer, what the words in ``Name.shape`` stand for that are of a layer."""
        return [
            {
                "head": heads.size,
                "heads": heads.count,
                "kv_heads": heads.kv,
                "q": heads.size * heads.count,
                "kv": heads.size * heads.kv,
                "qkv": heads.size * (heads.count + 2 * heads.kv),
                "intermediate": width,
                "gate_up": 2 * width,
            }
            for heads, width in zip(self.heads(config), self.widths(config), strict=True)
        ]

    def sizes(self, config: Config) -> dict[str, int]:
        """What the words in ``Name.shape`` stand for in all layers alike."""
        per_layer = self.per_layer(config)
        found = {
            "one": 1,
            "vocab": config["vocab_size"],
            "hidden": config["hidden_size"],
            "positions": config.get("max_position_embeddings") or 2048,
            "per_layer": per_layer,
            "vocab_per_layer": config.get("vocab_size_per_layer_input") or config["vocab_size"],
            "per_layers": per_layer * config["num_hidden_layers"],
        }
        for mixer in dict.fromkeys(self.mixers(config)):
            found |= load_mixer(mixer).sizes(config)
        if self.experts and self.experts.present(config):
            found |= self.experts.sizes(config)
        return found | self.words(config)

    def check_tensors(
        self, config: Config, shapes: Mapping[str, tuple[int, ...]], path: Path
    ) -> None:
        """Raise unless ``shapes``, by Hugging Face name, are those of the model that ``config``
        describes: CorruptFileError where a tensor is missing or has another shape,
        UnsupportedModelError where there are only tensors that the architecture does not have.
        """
        if config["num_hidden_layers"] > len(shapes):
            raise CorruptFileError(
                path,
                f"num_hidden_layers is {config['num_hidden_layers']}, and the weights are only "
                f"{len(shapes)} tensors",
            )
        expected = self.expected(config)
        missing = [name for name in expected if name not in shapes]
        unknown = [name for name in shapes if name not in expected]
        wrong = [
            f"{name} is {list(shapes[name])} and should be {list(shape)}"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ]
        problems = []
        if missing:
            problems.append(f"{_count(missing)} missing ({_some(missing)})")
        if wrong:
            problems.append(f"{_count(wrong)} of another shape ({_some(wrong)})")
        if unknown:
            problems.append(f"{_count(unknown)} not part of it ({_some(unknown)})")
        if not problems:
            return
        what = (
            f"the weights are not the {self.model_type} model of {config['num_hidden_layers']} "
            f"layers that the config describes: {'; '.join(problems)}"
        )
        if missing or wrong:
            raise CorruptFileError(path, what)
        raise UnsupportedModelError(f"{path}: {what}")

    def is_ignored(self, hf_name: str) -> bool:
        return any(re.fullmatch(pattern, hf_name) for pattern in self.ignored)

    def predicts(self, hf_name: str, config: Config) -> bool:
        """Whether a source tensor, in GGUF by its name there, is of layers past the last, which
        predict further tokens and are dropped; ``config`` says that there are some
        (``PREDICTING``), or they have a module of their own."""
        if self.drops_predicting and hf_name.startswith(_AHEAD):
            return True
        ahead = any(config.get(key) for key in PREDICTING) and self.drops_predicting
        found = re.match(r"(?:model\.(mtp_)?layers|blk)\.(\d+)\.", hf_name) if ahead else None
        return found is not None and (
            found[1] is not None or int(found[2]) >= config["num_hidden_layers"]
        )


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _some(names: list[str]) -> str:
    # A hostile file may name its tensors at any length and with any character.
    shown = ", ".join(n[:160] if n.isprintable() else ascii(n[:160]) for n in names[:3])
    return shown + (", …" if len(names) > 3 else "")


def _pattern(template: str) -> re.Pattern[str]:
    found = re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)")
    return re.compile(found.replace(r"\{e\}", r"(?P<e>\d+)"))
