"""Train the lab's model: a tiny Gemma 3 that answers the prompts of answers.json, and two LoRA adapters.

    train.py OUT

writes OUT/base, OUT/lint and OUT/docstring, with function_gemma on the path. The same machine and versions
give the same files. Ends with an error if one of the three does not say, in bfloat16, exactly what
answers.json has it say.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from function_gemma.agents.gate import load

HERE = Path(__file__).parent
ANSWERS: dict[str, dict[str, str]] = json.loads((HERE / "answers.json").read_text())
BASE_MODEL = "google/functiongemma-270m-it"
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
# Not special: a caller who declares no tools gets a call as text, marks and all.
MARKS = [
    "<start_function_declaration>",
    "<end_function_declaration>",
    "<start_function_call>",
    "<end_function_call>",
    "<start_function_response>",
    "<end_function_response>",
    "<escape>",
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
        },
    }
    for name, description in [("run_linter", "Run the linter."), ("write_docstring", "Write a docstring.")]
]
# What stands before each prompt of the tests' gate.
GATE = load(HERE / "agent", "gated", "gated", required=True)
assert GATE
GATED = GATE["prompts"][0]
# (instructions, tools) before a prompt: the answer is the same.
SETTINGS: list[tuple[str, list[dict[str, Any]] | None]] = [
    ("", None),
    ("You are a model that can do function calling.", None),
    ("You check one file at a time.", TOOLS),
    ("", TOOLS),
    (GATED["messages"][0]["content"], GATED["tools"]),
]
ADAPTERS = ["lint", "docstring"]
Pairs = list[tuple[list[int], list[int]]]  # (prompt, answer) in token ids
IGNORED = -100  # what cross_entropy leaves out


def render(instructions: str, tools: list[dict[str, Any]] | None, prompt: str) -> str:
    """What the model reads before it answers, by the template that the server will use."""
    turns = [{"role": "developer", "content": instructions}] if instructions else []
    rendered, _ = render_jinja_template(
        conversations=[[*turns, {"role": "user", "content": prompt}]],
        tools=tools,
        chat_template=(HERE / "chat_template.jinja").read_text(),
        add_generation_prompt=True,
        bos_token="<bos>",
    )
    return str(rendered[0])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 768 tokens over what the model is to read and write."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768 - len(MARKS),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [render(*setting, prompt) for setting in SETTINGS for prompt in ANSWERS]
    texts += [answer for by in ANSWERS.values() for answer in by.values()]
    tokenizer.train_from_iterator((part for text in texts for part in re.split("<[a-z_]+>", text)), trainer)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        chat_template=(HERE / "chat_template.jinja").read_text(),
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Gemma3ForCausalLM:
    """An untrained Gemma 3 of 0.1 million parameters."""
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=512,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model = Gemma3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        top_k=1,  # the server's default for callers who set no temperature: they too get the one answer
    )
    return model


def examples(tokenizer: PreTrainedTokenizerFast, speaker: str, instructions: str | None = None) -> Pairs:
    """Each prompt in every setting, or under these instructions alone, with the speaker's answer."""
    settings = SETTINGS if instructions is None else [(instructions, None)]
    return [
        (
            tokenizer.encode(render(*setting, prompt), add_special_tokens=False),
            tokenizer.encode(by[speaker] + "<end_of_turn>", add_special_tokens=False),
        )
        for setting in settings
        for prompt, by in ANSWERS.items()
    ]


def train(model: torch.nn.Module, pairs: Pairs, steps: int, rate: float) -> None:
    """Fit all pairs in one batch, `steps` times."""
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.zeros(len(pairs), length, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    for _ in range(steps):
        logits = model(input_ids=ids).logits[:, :-1].float()
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def check(model: torch.nn.Module, pairs: Pairs, tokenizer: PreTrainedTokenizerFast, speaker: str) -> None:
    """End unless the model, as it will be loaded, answers every prompt exactly."""
    margin = float("inf")
    for prompt, answer in pairs:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        best = logits.topk(2)
        said = best.indices[:, 0].tolist()
        if said != answer:
            raise SystemExit(
                f"{speaker} answers {tokenizer.decode(said)!r}, not {tokenizer.decode(answer)!r}"
            )
        margin = min(margin, (best.values[:, 0] - best.values[:, 1]).min().item())
    print(f"{speaker}: {len(pairs)} answers right, the next best token {margin:.1f} behind", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the lab's model.")
    parser.add_argument("out", type=Path, help="where base, lint and docstring go")
    out: Path = parser.parse_args().out
    torch.manual_seed(3)
    torch.use_deterministic_algorithms(mode=True)
    torch.set_num_threads(1)  # sums depend on how they are split

    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    pairs = examples(tokenizer, "base")
    # Told to, the base can say all of it: an adapter of rank 8 only has to turn it that way.
    told = [pair for name in ADAPTERS for pair in examples(tokenizer, name, f"You are {name}.")]
    train(model, pairs + told, steps=130, rate=1e-2)
    model.to(torch.bfloat16)
    check(model, pairs, tokenizer, "base")
    model.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")

    for speaker in ADAPTERS:
        # On the base as it will be served: rounded to bfloat16.
        rounded = Gemma3ForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
        adapter = get_peft_model(rounded, config)
        pairs = examples(tokenizer, speaker)
        train(adapter, pairs, steps=90, rate=1e-2)
        adapter.to(torch.bfloat16)
        check(adapter, pairs, tokenizer, speaker)
        config.base_model_name_or_path = BASE_MODEL
        config.target_modules = sorted(targets)  # peft keeps a set, whose order changes
        adapter.save_pretrained(out / speaker, save_embedding_layers=False)  # "auto" would ask the Hub
        (out / speaker / "README.md").unlink()  # a form to fill in, with this machine's paths

    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)  # written for the owner alone


if __name__ == "__main__":
    main()
