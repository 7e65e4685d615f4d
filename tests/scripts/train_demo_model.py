"""Train the embedded model: a Gemma 2 of 3.1 million parameters, from scratch, on the corpora of `../shared/data`.

    python tests/scripts/train_demo_model.py --work /path/for/checkpoints [--device cuda]

1. Text: TinyStories, fairy tales, children's classics, and sentences made from nouns of the *training* files of
   feature-circuits' agreement pairs (`agreement_sentences.py`). A story of the hold-out text in any of it is an error.
2. Rows of 256 tokens, each from BOS on, the sources interleaved in fixed shares. In every other row a document does
   not see those before it, so that the model reads a text by itself and packed ones alike. The rows and their order are
   a function of the seed alone, so a step number is a position in the data.
3. AdamW under bfloat16 autocast; learning rate constant, then linear to zero (Hägele et al. 2024, arXiv 2405.18392),
   so that the number of steps may still be chosen while the first ones run.
4. A checkpoint every 200 steps, written whole. Started again with the same arguments, the run goes on from it.
5. Held-out loss and agreement (nouns of the sentences, nouns held out of them, nouns of neither) to `model_log.jsonl`.

For the speed of one thread set MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000
MALLOC_TOP_PAD_=500000000, so that freed memory is reused.
"""

import argparse
import json
import lzma
import random
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from agreement_sentences import Nouns, Pair, document, pairs_of, read_nouns, read_pairs
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
SEPARATOR = "\n<|endoftext|>\n"
CONTEXT, BATCH, PEAK, WARMUP, DECAY = 256, 16, 3e-3, 150, 0.35
EOS, BOS, CONTINUES = 1, 2, -2
# Shares of the rows. The stories are read about six times, the classics less than once.
SHARES = {"stories": 0.60, "fairytales": 0.11, "classics": 0.22, "agreement": 0.07}
MOST_STEPS = 9_000
# Every fourth noun stays out of the sentences, so that agreement is also measured on nouns they do not have.
HELD_OUT = slice(3, None, 4)
# In neither the agreement pairs nor the sentences: only for measuring.
UNSEEN = (
    ("king", "kings"), ("queen", "queens"), ("baker", "bakers"), ("pilot", "pilots"), ("nurse", "nurses"),
    ("author", "authors"), ("sister", "sisters"), ("brother", "brothers"), ("parent", "parents"),
    ("child", "children"), ("wife", "wives"), ("soldier", "soldiers"), ("sailor", "sailors"), ("painter", "painters"),
    ("actor", "actors"), ("dancer", "dancers"), ("student", "students"), ("manager", "managers"),
    ("customer", "customers"), ("officer", "officers"), ("guard", "guards"), ("secretary", "secretaries"),
    ("minister", "ministers"), ("surgeon", "surgeons"),
)  # fmt: skip


@cache
def held_out_text(data: Path) -> list[str]:
    """Take the stories called held-out that are in no training corpus; some are, whole or with another middle."""
    folder = data / "corpora"
    trained_on = [(folder / f"tinystories_{name}.txt").read_text() for name in ("train", "truecased_extra")]
    stories = (folder / "tinystories_val.txt").read_text(encoding="utf-8").removesuffix(SEPARATOR).split(SEPARATOR)
    return [
        story for story in stories if not any(story[:120] in corpus or story[-120:] in corpus for corpus in trained_on)
    ]


def passages(book: str, *, length: int = 900) -> list[str]:
    """Cut a book at line ends into passages of about one row."""
    found, lines = [], []
    for line in book.split("\n"):
        lines.append(line)
        if sum(map(len, lines)) > length:
            found.append("\n".join(lines))
            lines = []
    return [*found, "\n".join(lines)] if lines else found


def corpora(data: Path) -> dict[str, list[str]]:
    folder = data / "corpora"
    stories = [
        story
        for name in ("train", "truecased_extra")
        for story in (folder / f"tinystories_{name}.txt").read_text(encoding="utf-8").split(SEPARATOR)
    ]
    tales = (folder / "fairytales.txt").read_text(encoding="utf-8").split(SEPARATOR)
    with lzma.open(folder / "childrens_classics.txt.xz", "rt", encoding="utf-8") as file:
        # A book begins with its title, author and year above a rule.
        books = [book.split("-------\n", 1)[-1] for book in file.read().split(SEPARATOR)]
    nouns = sentence_nouns(data)
    draw = random.Random(0)  # noqa: S311  (no secret)
    texts = {
        "stories": stories,
        "fairytales": [passage for tale in tales for passage in passages(tale)],
        "classics": [passage for book in books for passage in passages(book)],
        "agreement": [document(nouns, draw) for _ in range(160_000)],
    }
    texts = {name: [text.strip() for text in found if text.strip()] for name, found in texts.items()}
    for name, found in texts.items():
        everything = "\n".join(found)
        seen = [text for text in held_out_text(data) if text[:120] in everything or text[-120:] in everything]
        if seen:
            raise ValueError(f"{len(seen)} stories of the hold-out text are in {name}: {seen[0][:60]!r} ...")
    return texts


def sentence_nouns(data: Path) -> Nouns:
    nouns = read_nouns(data / "agreement")
    return nouns.without({noun[0] for group in nouns for noun in group[HELD_OUT]})


def rows_of(texts: list[str], *, n_rows: int, tokenizer: Tokenizer, seed: int) -> np.ndarray:
    """Lay documents end to end in shuffled passes and cut them to rows.

    A row that goes on with a document gets a BOS too, written as `CONTINUES`: its next token is not to be learnt.
    """
    documents = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    draw = np.random.default_rng(seed)
    stream: list[int] = []
    while len(stream) < n_rows * (CONTEXT - 1) + 1:
        for index in draw.permutation(len(documents)):
            stream += [BOS, *documents[index], EOS]
    rows = np.full((n_rows, CONTEXT), BOS, dtype=np.int16)
    start = 0
    for row in rows:
        if stream[start] == BOS:
            start += 1
        else:
            row[0] = CONTINUES
        row[1:] = stream[start : start + CONTEXT - 1]
        start += CONTEXT - 1
    return rows


def training_rows(data: Path, tokenizer: Tokenizer, file: Path) -> np.ndarray:
    """Interleave the sources' rows in their shares, each source in its own order."""
    if not file.exists():
        parts, places = [], []
        for seed, (name, texts) in enumerate(corpora(data).items()):
            n_rows = round(SHARES[name] * MOST_STEPS * BATCH)
            parts.append(rows_of(texts, n_rows=n_rows, tokenizer=tokenizer, seed=seed))
            places.append((np.arange(n_rows) + np.random.default_rng(seed).random(n_rows)) / n_rows)
            print(f"{name}: {len(texts):,} documents, {n_rows:,} rows", flush=True)
        part = file.with_name(f"{file.name}.part")
        order = np.argsort(np.concatenate(places), kind="stable")
        with part.open("wb") as out:
            np.save(out, np.concatenate(parts)[order])
        part.replace(file)
    return np.load(file, mmap_mode="r")


def new_model(data: Path, seed: int) -> torch.nn.Module:
    config = AutoConfig.from_pretrained(data / "tiny-gemma2-stories")
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)


def masks(tokens: torch.Tensor, window: int) -> dict[str, torch.Tensor]:
    """Additive masks: a token sees earlier ones, in the odd rows only those of its own document."""
    document = (tokens == BOS).cumsum(1)
    document[::2] = 0
    position = torch.arange(tokens.shape[1], device=tokens.device)
    back = position[:, None] - position[None]
    sees = (document[:, :, None] == document[:, None]) & (back >= 0)
    full, sliding = (
        torch.zeros(seen.shape, device=tokens.device, dtype=torch.bfloat16).masked_fill(~seen, -1e9)[:, None]
        for seen in (sees, sees & (back < window))
    )
    return {"full_attention": full, "sliding_attention": sliding}


def loss_of(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    tokens = rows.abs()
    labels = tokens[:, 1:].clone()
    labels[(tokens[:, :-1] == EOS) | (rows[:, :-1] == CONTINUES)] = -100
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        logits = model(tokens, attention_mask=masks(tokens, model.config.sliding_window), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=-100)


def learning_rate(step: int, steps: int) -> float:
    return PEAK * min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY * steps))


@torch.no_grad()
def agreement(model: torch.nn.Module, tokenizer: Tokenizer, pairs: list[Pair], device: str) -> float:
    """Share of prompts after which the agreeing verb has the larger logit."""
    answers = torch.tensor([[tokenizer.encode(a, add_special_tokens=False).ids for a in pair[1:3]] for pair in pairs])
    prompts = [tokenizer.encode(pair.prefix).ids for pair in pairs]
    right = 0
    for length in sorted(set(map(len, prompts))):
        chosen = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        logits = model(torch.tensor([prompts[i] for i in chosen], device=device)).logits[:, -1].cpu()
        verbs = logits.gather(1, answers[chosen, :, 0])
        right += int((verbs[:, 0] > verbs[:, 1]).sum())
    return right / len(pairs)


@torch.no_grad()
def measure(model: torch.nn.Module, tokenizer: Tokenizer, data: Path, device: str) -> dict[str, float]:
    """Loss on the hold-out text, nats per token in float32, and agreement by where its nouns stand."""
    total, count = 0.0, 0
    for story in held_out_text(data):
        tokens = torch.tensor([tokenizer.encode(story).ids[:CONTEXT]], device=device)
        logits = model(tokens).logits
        total += torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum").item()
        count += tokens.shape[1] - 1
    known = {form for group in sentence_nouns(data) for noun in group for form in noun}
    found = {"held_out_loss": total / count, "unseen": agreement(model, tokenizer, pairs_of(UNSEEN), device)}
    for name in ("simple", "nounpp"):
        pairs = read_pairs(data / "agreement" / f"{name}_train.json")
        for group, of in (("known", True), ("held_out", False)):
            chosen = [pair for pair in pairs if (set(pair.nouns) <= known) == of]
            found[f"{name}_{group}"] = agreement(model, tokenizer, chosen, device)
    return {name: round(value, 4) for name, value in found.items()}


def train(data: Path, work: Path, *, steps: int, device: str, seed: int = 0, every: int = 200) -> None:
    tokenizer = Tokenizer.from_file(str(data / "tiny-gemma2-stories" / "tokenizer.json"))
    rows = training_rows(data, tokenizer, work / "rows.npy")
    model = new_model(data, seed).to(device)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), fused=True)
    checkpoint, step, seconds = work / "model.pt", 0, 0.0
    if checkpoint.exists():
        kept = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(kept["model"])
        optimiser.load_state_dict(kept["optimiser"])
        step, seconds = kept["step"], kept["seconds"]
    begun = time.process_time() - seconds
    model.train()
    while step < steps:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps)
        batch = torch.from_numpy(rows[step * BATCH : (step + 1) * BATCH].astype(np.int64)).to(device)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        entry: dict[str, float] = {"step": step, "loss": round(loss.item(), 4), "lr": learning_rate(step - 1, steps)}
        if step % every == 0 or step == steps:
            seconds = time.process_time() - begun
            kept = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step, "seconds": seconds}
            torch.save(kept, work / "model.pt.part")
            (work / "model.pt.part").replace(checkpoint)
        if step % (2 * every) == 0 or step == steps:
            model.eval()
            entry |= measure(model, tokenizer, data, device)
            model.train()
        if step % 20 == 0 or step == steps:
            entry["cpu_seconds"] = round(time.process_time() - begun, 1)
            with (work / "model_log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
    model.eval()
    model.save_pretrained(work / "model")
    print(json.dumps(measure(model, tokenizer, data, device)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, required=True, help="folder for rows, checkpoints and the finished model")
    parser.add_argument("--steps", type=int, default=3_800, help="of 4,096 tokens each")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    train(arguments.data, arguments.work, steps=arguments.steps, device=arguments.device)


if __name__ == "__main__":
    main()
