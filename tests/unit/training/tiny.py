"""A language model of a few thousand weights with a vocabulary of its own, and a sampler on Transformers.

Real classes throughout, so that what is tested here is what runs: only the size differs.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evaluation.sampler import Sample
from training.policy import load_policy, write_checkpoint

WORDS = ["<pad>", "<unk>", "<end>", "user", "assistant", *(f"w{i}" for i in range(59))]
END = WORDS.index("<end>")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        chat_template=TEMPLATE,
    )


def tiny_model(directory: Path, seed: int = 0) -> Path:
    """Write a checkpoint with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=128,  # two heads of 64, which vLLM's attention can do
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=END,
        tie_word_embeddings=True,
    )
    write_checkpoint(LlamaForCausalLM(config), tiny_tokenizer(), directory)
    return directory


class TransformersSampler:
    """Samples token by token from the whole sequence, the obvious way."""

    def __init__(self, model_dir: Path) -> None:
        self.load(model_dir)

    def load(self, model_dir: Path) -> None:
        self._model = load_policy(model_dir)
        self._tokenizer = tiny_tokenizer()

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Sequence[int]], *, n: int, max_tokens: int, temperature: float, seed: int
    ) -> list[list[Sample]]:
        generator = torch.Generator().manual_seed(seed)
        return [[self._one(list(p), max_tokens, temperature, generator) for _ in range(n)] for p in prompts]

    def _one(
        self, prompt: list[int], max_tokens: int, temperature: float, generator: torch.Generator
    ) -> Sample:
        token_ids: list[int] = []
        logprobs: list[float] = []
        while len(token_ids) < max_tokens and END not in token_ids:
            logits = self._model(input_ids=torch.tensor([prompt + token_ids])).logits[0, -1].float()
            distribution = (logits / (temperature or 1.0)).log_softmax(-1)
            if temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial(distribution.exp(), 1, generator=generator))
            token_ids.append(token)
            logprobs.append(float(distribution[token]))
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return Sample(token_ids, logprobs, text, "stop" if END in token_ids else "length")

    @torch.no_grad()
    def loglikelihoods(
        self, items: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        return [self._likelihood(list(context), list(continuation)) for context, continuation in items]

    def _likelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        total, greedy = 0.0, True
        for i, token in enumerate(continuation):
            logits = self._model(input_ids=torch.tensor([context + continuation[:i]])).logits[0, -1].float()
            total += float(logits.log_softmax(-1)[token])
            greedy &= int(logits.argmax()) == token
        return total, greedy

    def close(self) -> None:
        pass
