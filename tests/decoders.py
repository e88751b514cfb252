"""Tiny language models of Hugging Face, made from their configs: nothing is downloaded."""

import copy

import torch
import transformers
from torch import nn

transformers.logging.set_verbosity_error()

WORDS, LENGTH, WIDTH = 23, 7, 16
_COMMON = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 0}
_LLAMA = {
    **_COMMON,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}

CONFIGS = {
    "gpt_neox": transformers.GPTNeoXConfig(
        **_COMMON,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=16,
    ),
    "gpt2": transformers.GPT2Config(**_COMMON, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=16),
    "llama": transformers.LlamaConfig(**_LLAMA),
    # The size of a head is not width/heads, and the embeddings are tied.
    "qwen3": transformers.Qwen3Config(**_LLAMA, head_dim=6, tie_word_embeddings=True),
}


def decoder(name: str, attention: str = "eager") -> nn.Module:
    """A model of two layers, in float64; all parameters are random, biases and norms too."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])  # a model keeps it, and a test may change it
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = model.double().eval()
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.add_(0.3 * torch.randn_like(leaf))
    return model


def sentences(number: int = 6) -> dict[str, torch.Tensor]:
    """Random tokens; the first sentence ends early."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(WORDS, (number, LENGTH), generator=generator)
    attended = torch.ones_like(tokens)
    attended[0, 4:] = 0
    return {"input_ids": tokens, "attention_mask": attended}
