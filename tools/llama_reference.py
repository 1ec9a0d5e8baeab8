"""What transformers computes of the weights of examples/llama: tests/data/smollm2.json.

    python -m venv reference
    reference/bin/pip install torch transformers accelerate gguf
    reference/bin/python tools/llama_reference.py SmolLM2-135M-Instruct.Q4_1.gguf

`examples/llama/llama_weights.py` says where the file comes from. Tokenizer, chat
template, dequantisation of the file, and model are those of transformers, in float64;
nothing of this project is imported. Of each prompt the result has the tokens, and for
every position the likeliest next tokens with their probabilities; and a greedy
continuation.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import torch
import transformers

PROMPTS = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Answer with one number."},
        {"role": "user", "content": "I had 12345 apples and ate 678. How many now?"},
    ],
    [
        {"role": "user", "content": "Name three colours."},
        {"role": "assistant", "content": "Red, green and blue."},
        {"role": "user", "content": "And which one is the colour of the sky?"},
    ],
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Die Straße nach Köln war naß — “aber schön”, sagte Zoë. 🚲🇩🇪\n\nIt's",
)
LIKELIEST = 5
CONTINUED = 64


def described(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompt: str | list[dict[str, str]],
) -> dict:
    """The entry of one prompt."""
    if isinstance(prompt, str):
        tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    else:
        text = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=False
        )
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        probabilities = model(torch.tensor([tokens])).logits[0].softmax(-1)
        values, indices = probabilities.topk(LIKELIEST)
        # Also past tokens that end an answer.
        continued = model.generate(
            torch.tensor([tokens]),
            max_new_tokens=CONTINUED,
            do_sample=False,
            eos_token_id=None,
        )[0].tolist()
    margin = float((values[:, 0] - values[:, 1]).min())
    print(f"{len(tokens)} tokens, smallest lead of a likeliest token {margin:.2e}")
    print(tokenizer.decode(continued), flush=True)
    return {
        "prompt": prompt,
        "tokens": tokens,
        "likeliest": indices.tolist(),
        "probabilities": [[float(f"{p:.7g}") for p in row] for row in values.tolist()],
        "continuation": continued[len(tokens) :],
    }


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description="Stores what transformers computes.")
    parser.add_argument("gguf", type=pathlib.Path, help="the GGUF file")
    target = pathlib.Path(__file__).parents[1] / "tests" / "data" / "smollm2.json"
    parser.add_argument("--out", type=pathlib.Path, default=target)
    arguments = parser.parse_args()
    where = {
        "pretrained_model_name_or_path": str(arguments.gguf.parent),
        "gguf_file": arguments.gguf.name,
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, attn_implementation="eager"
    )
    model = model.double().eval()
    result = {
        "made_by": f"tools/llama_reference.py, transformers {transformers.__version__},"
        f" torch {torch.__version__}, {arguments.gguf.name}",
        "prompts": [described(model, tokenizer, prompt) for prompt in PROMPTS],
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, ensure_ascii=False) + "\n")
    print(f"{arguments.out}: {arguments.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
