"""A GGUF file as a checkpoint with Hugging Face's names, row orders and config."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxedge.encodings import GGML, PLAIN, Encoding
from mlxedge.errors import (
    CorruptFileError,
    MlxedgeError,
    UnsupportedEncodingError,
    UnsupportedModelError,
)
from mlxedge.gguf_values import GgufValue
from mlxedge.models import ModelSpec, rope_row_order, spec_for_gguf
from mlxedge.models.layout import heads_of
from mlxedge.models.spec import RowOrder
from mlxedge.ops import Parts, load_reference
from mlxedge.sources.checkpoint import Checkpoint, Origin, SourceTensor, Tensors
from mlxedge.sources.files import Opener, RandomAccessFile, check_rows, numpy_dtype, shown
from mlxedge.sources.gguf import GgufFile, GgufTensor
from mlxedge.sources.gguf_names import stem_of
from mlxedge.sources.gguf_split import read_model
from mlxedge.tokenizer.spec import TokenizerSpec

_QUANT = re.compile(
    rf"[-._]({'|'.join((*PLAIN, *GGML))}|(i?q\d_(k_)?(xs|s|m|l|xl|xxs)))$", re.IGNORECASE
)
_DTYPE_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def open_gguf(
    path: Path,
    *,
    repo: str | None = None,
    revision: str | None = None,
    open_file: Opener = RandomAccessFile,
) -> Checkpoint:
    """Open a GGUF file, or a model in several of which ``path`` is any.

    Raises CorruptFileError, SourceNotFoundError (a part is missing), UnsupportedModelError (an
    unknown architecture, a tensor that the architecture does not have, no model at all) and
    UnsupportedEncodingError.
    """
    gguf = read_model(path, open_file)
    arch = _text(gguf, "general.architecture")
    if arch is None and _text(gguf, "general.type") == "imatrix":
        raise UnsupportedModelError(
            f"{path} is an imatrix file, not a model: give it to convert --calibrate"
        )
    if arch is None:
        raise CorruptFileError(path, "the metadata has no general.architecture")
    spec = spec_for_gguf(arch, gguf.metadata)
    paths = gguf.parts or (path,)
    with contextlib.ExitStack() as stack:
        files = []
        for part in paths:
            files.append(open_file(part))
            stack.callback(files[-1].close)
        extra = {
            t.name: _floats(files[t.part], t) for t in gguf.tensors if t.name in spec.gguf_only
        }
        config = _config(gguf, spec, extra)
        tensors = _tensors(files, gguf, spec, config)
        tokenizer = _tokenizer(gguf.metadata)
        opened = stack.pop_all()
    return Checkpoint(
        name=model_name(path),
        config=config,
        tensors=tensors,
        tokenizer=tokenizer,
        generation_config={},
        origin=Origin("gguf", path, paths, repo, revision),
        license=_text(gguf, "general.license"),
        base_model=_base_model(gguf),
        on_close=opened.close,
    )


def model_name(path: Path) -> str:
    """The file's name without its type and number: SmolLM2-135M.Q4_1.gguf → SmolLM2-135M."""
    stem = stem_of(path.name) or path.name.removesuffix(".gguf")
    return _QUANT.sub("", stem) or stem


def _text(gguf: GgufFile, key: str) -> str | None:
    value = gguf.metadata.get(key)
    if value is None:
        return None
    if value.kind != "str":
        raise CorruptFileError(gguf.path, f"{key} must be a string, not {value.kind}")
    text: str = value.value
    return text


def _base_model(gguf: GgufFile) -> str | None:
    url = _text(gguf, "general.base_model.0.repo_url") or ""
    found = re.fullmatch(r"https://huggingface\.co/([\w.-]+/[\w.-]+)", url)
    return found[1] if found else None


def _config(gguf: GgufFile, spec: ModelSpec, extra: Mapping[str, np.ndarray]) -> dict[str, Any]:
    try:
        config = spec.config_from_gguf(gguf.metadata, extra)
    except MlxedgeError:
        raise
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise CorruptFileError(
            gguf.path, f"the metadata of architecture {spec.gguf_arch} makes no sense: {error}"
        ) from error
    names = {t.name for t in gguf.tensors}
    own = {name.split(".", 2)[-1] for name in names if name.startswith("blk.")}
    config["tie_word_embeddings"] = "output.weight" not in names
    for key, tensor in _OPTIONS.items():
        if key in config:
            config[key] = not own.isdisjoint((tensor, tensor.replace("attn_q.", "attn_qkv.")))
    for key, tensor in _WITHOUT.items():
        if key in config:
            config[key] = bool(config[key]) or tensor not in names
    config = spec.by_tensors(config, names)
    config["torch_dtype"] = _DTYPE_NAMES[_float_type(gguf)]
    for key, gguf_key in _SPECIAL_IDS.items():
        token = gguf.metadata.get(gguf_key)
        if token is not None and type(token.value) is int:
            config[key] = token.value
    return config


#: Config keys, each with a tensor of a layer that tells what they say; not all layers may have it.
_OPTIONS = {
    "attention_bias": "attn_q.bias",
    "use_qkv_bias": "attn_q.bias",
    "mlp_bias": "ffn_up.bias",
    "own_attention_norm": "attn_norm_2.weight",
    "use_qk_norm": "attn_q_norm.weight",
    "qk_layernorm": "attn_q_norm.weight",
    "mamba_rms_norm": "ssm_norm.weight",
}
#: The same of a tensor that is missing, where the metadata does not say so.
_WITHOUT = {"use_parallel_residual": "blk.0.ffn_norm.weight"}
_SPECIAL_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


def _float_type(gguf: GgufFile) -> str:
    """The dtype of the matrices where they are not quantized, and f16 where they are."""
    weights: Counter[Encoding] = Counter()
    for tensor in gguf.tensors:
        if len(tensor.shape) > 1:
            weights[tensor.encoding] += tensor.nbytes
    main = weights.most_common(1)[0][0] if weights else PLAIN["f16"]
    return main.name if main in PLAIN.values() else "f16"


def _tokenizer(metadata: Mapping[str, GgufValue]) -> TokenizerSpec | None:
    if "tokenizer.ggml.model" not in metadata:
        return None
    from mlxedge.tokenizer import from_gguf

    spec: TokenizerSpec = from_gguf(metadata)
    return spec


def _tensors(
    files: Sequence[RandomAccessFile], gguf: GgufFile, spec: ModelSpec, config: dict[str, Any]
) -> Tensors:
    tensors: dict[str, SourceTensor] = {}
    unknown = []
    for tensor in gguf.tensors:
        file = files[tensor.part]
        if tensor.name in spec.gguf_only:
            continue
        # What is left out in the end keeps its name until then.
        ahead = spec.predicts(tensor.name, config)
        found = None if ahead else spec.from_gguf(tensor.name)
        if found is None and not ahead:
            unknown.append(tensor.name)
            continue
        name, order = found or (tensor.name, "same")
        if tensor.encoding.family == "plain" and tensor.encoding not in PLAIN.values():
            raise UnsupportedEncodingError(
                f"{file.path}: tensor {shown(tensor.name)} is {tensor.encoding}; weights must be "
                f"{', '.join(PLAIN)} or a ggml block type"
            )
        if spec.rank(name) == 2 and len(tensor.shape) == 1:
            tensor = replace(tensor, shape=(1, *tensor.shape))  # ggml counts no leading one
        source = _source_tensor(file, tensor, name, order, config)
        offset = spec.offset(name)
        tensors[name] = _without(source, offset) if offset else source
    if unknown:
        raise UnsupportedModelError(
            f"{gguf.path}: architecture {spec.gguf_arch} has no tensor "
            f"{', '.join(map(shown, unknown[:3]))}{' …' if len(unknown) > 3 else ''}; "
            "the file needs a reader that knows them"
        )
    for key, entries in spec.listed(config["num_hidden_layers"]).items():
        for (name, shape), number in zip(entries, _numbers(gguf, key, len(entries)), strict=True):
            tensors[name] = _constant(name, np.full(shape, number, np.float32))
    return Tensors(tensors)


def _numbers(gguf: GgufFile, key: str, layers: int) -> list[float]:
    """One of each layer: an array of the metadata, or a number for all."""
    value = gguf.metadata.get(key)
    if value is None or (value.item or value.kind) not in ("f32", "f64"):
        raise CorruptFileError(gguf.path, f"the metadata has no numbers {key}")
    found = [float(v) for v in value.value] if value.item else [float(value.value)] * layers
    if len(found) != layers:
        raise CorruptFileError(gguf.path, f"{key} has {len(found)} numbers for {layers} layers")
    return found


def _constant(name: str, values: np.ndarray) -> SourceTensor:
    def read(start: int, stop: int) -> Parts:
        check_rows(name, 1, start, stop)
        return {"weight": values.reshape(1, -1)[start:stop].copy()}

    return SourceTensor(name, values.shape, PLAIN["f32"], read)


def _source_tensor(
    file: RandomAccessFile, tensor: GgufTensor, name: str, order: RowOrder, config: dict[str, Any]
) -> SourceTensor:
    part = tensor.encoding.parts(tensor.shape)["weight"]
    dtype = numpy_dtype(part.dtype)
    if len(tensor.shape) == 1:
        rows, row_bytes = 1, tensor.nbytes
    else:
        rows = tensor.nbytes // (part.shape[-1] * dtype.itemsize)
        row_bytes = tensor.nbytes // rows

    def stored(start: int, stop: int) -> np.ndarray:
        return file.read_rows(tensor.offset, row_bytes, start, stop).view(dtype)

    def same(start: int, stop: int) -> Parts:
        check_rows(name, rows, start, stop)
        return {"weight": stored(start, stop)}

    if order == "same":
        return SourceTensor(name, tensor.shape, tensor.encoding, same)
    heads = heads_of(order, config, tensor.shape[0])
    index = rope_row_order(tensor.shape[0], heads)

    def bias(start: int, stop: int) -> Parts:
        # A bias is one row, and its elements are what the matrix has as rows.
        check_rows(name, rows, start, stop)
        return {"weight": stored(start, stop)[:, index]}

    def reordered(start: int, stop: int) -> Parts:
        # Rows move within their head, so whole heads are read and the rest dropped.
        check_rows(name, rows, start, stop)
        head = rows // heads
        first, last = start // head * head, -(-stop // head) * head
        return {"weight": stored(first, last)[index[start:stop] - first]}

    return SourceTensor(
        name, tensor.shape, tensor.encoding, bias if len(tensor.shape) == 1 else reordered
    )


def _without(source: SourceTensor, offset: float) -> SourceTensor:
    """A plain tensor less what GGUF adds to its values, as f32."""

    def read_rows(start: int, stop: int) -> Parts:
        weight = load_reference().decode(source.read_rows(start, stop), source.encoding)
        return {"weight": weight.reshape(stop - start, -1) - np.float32(offset)}

    return replace(source, encoding=PLAIN["f32"], read_rows=read_rows)


def _floats(file: RandomAccessFile, tensor: GgufTensor) -> np.ndarray:
    """A small plain tensor as f32."""
    if tensor.encoding not in PLAIN.values():
        raise UnsupportedEncodingError(f"{file.path}: tensor {tensor.name} is {tensor.encoding}")
    raw = file.read_rows(tensor.offset, tensor.nbytes, 0, 1)
    return raw.view(numpy_dtype(tensor.encoding.name))[0].astype(np.float32)
