"""The reward model: a decoder with one scalar head, and how responses are scored with it.

Owns the module, its file format and the packing of one prompt with its K responses into one row. Fitting
it is `training/reward_model.py`'s; what a score decides is the gate's or PPO's.
Shapes: B rows (prompts), L packed length, T length, K responses, D width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

TokenIds = Sequence[int]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# With the short rows of training, plain attention is a fifth faster on a CPU, forward and backward.
ATTENTION = "eager" if DEVICE.type == "cpu" else "sdpa"


class RewardModel(nn.Module):  # type: ignore[misc]
    """r(x, y): a decoder's last hidden state at the last token of the response, through a linear head.

    `offset` and `scale` standardise the score (Huang et al. 2024, arXiv 2403.17031, detail 13: rewards are
    normalised before PPO), so that responses of the data it was fitted on have mean 0 and deviation 1.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        width = backbone.config.hidden_size
        self.head = nn.Linear(width, 1, device=DEVICE)
        # From zero: scores of a random head would be noise that the trunk has to unlearn first.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("offset", torch.zeros((), device=DEVICE))
        self.register_buffer("scale", torch.ones((), device=DEVICE))

    @classmethod
    def from_decoder(cls, model_dir: Path | str) -> "RewardModel":
        """Make a reward model that starts from a language model's trunk, with a new head."""
        return cls(_trunk(model_dir))

    @classmethod
    def load(cls, directory: Path) -> "RewardModel":
        """Read a fitted reward model from where `save` put it."""
        model = cls(_trunk(directory / "backbone"))
        model.load_state_dict(load_file(directory / "head.safetensors"), strict=False)
        return model

    def save(self, directory: Path) -> None:
        """Write `backbone/` (a Hugging Face directory) and `head.safetensors`."""
        self.backbone.save_pretrained(directory / "backbone")
        head = {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.")}
        save_file({name: value.contiguous() for name, value in head.items()}, directory / "head.safetensors")

    def hidden(self, rows: "PackedRows") -> Tensor:
        """Last hidden states of packed rows, (B, L, D)."""
        return last_hidden(self.backbone, rows)

    def score(self, hidden: Tensor) -> Tensor:
        """Standardised scores of hidden states (…, D) -> (…)."""
        return (self.head(hidden).squeeze(-1).float() - self.offset) / self.scale

    def forward(self, rows: "PackedRows") -> Tensor:
        """Scores of all responses of the rows, flat in row order, (sum of K,)."""
        row, last = rows.last_tokens()
        return self.score(self.hidden(rows)[row, last])


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Prompts, each followed by its K responses in one row; no response sees another.

    One pass over the prompt serves all its responses, and each response stands at the positions that it
    would have alone, so scores equal those of K separate sequences.
    `input_ids`, `position_ids`: (B, L); `attention_mask`: (B, 1, L, L), added to the attention's logits;
    `spans[b]`: the [start, end) of each response of row b, in order.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    spans: list[list[tuple[int, int]]]

    def last_tokens(self) -> tuple[Tensor, Tensor]:
        """Row and column of each response's last token, each (sum of K,)."""
        pairs = [(row, end - 1) for row, spans in enumerate(self.spans) for _, end in spans]
        index = torch.tensor(pairs, dtype=torch.long)
        return index[:, 0], index[:, 1]


def pack(items: Sequence[tuple[TokenIds, Sequence[TokenIds]]]) -> PackedRows:
    """Pack (prompt, responses) pairs of token ids; every response needs at least one token."""
    lengths = [len(prompt) + sum(len(response) for response in responses) for prompt, responses in items]
    batch, width = len(items), max(lengths)
    input_ids = torch.zeros(batch, width, dtype=torch.long)
    position_ids = torch.zeros(batch, width, dtype=torch.long)
    # Segment 0 is the prompt, k >= 1 the k-th response, -1 padding.
    segment = torch.full((batch, width), -1)
    all_spans: list[list[tuple[int, int]]] = []
    for row, (prompt, responses) in enumerate(items):
        at = len(prompt)
        input_ids[row, :at] = torch.tensor(prompt, dtype=torch.long)
        position_ids[row, :at] = torch.arange(at)
        segment[row, :at] = 0
        spans = []
        for k, response in enumerate(responses, start=1):
            end = at + len(response)
            input_ids[row, at:end] = torch.tensor(response, dtype=torch.long)
            position_ids[row, at:end] = torch.arange(len(prompt), len(prompt) + len(response))
            segment[row, at:end] = k
            spans.append((at, end))
            at = end
        all_spans.append(spans)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    same = segment[:, :, None] == segment[:, None, :]
    to_prompt = (segment[:, None, :] == 0) & (segment[:, :, None] >= 0)
    visible = (causal & (same | to_prompt))[:, None]
    mask = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.bfloat16).min)
    return PackedRows(input_ids, position_ids, mask, all_spans)


def rows_by_tokens(sizes: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Group indices by like size, at most `budget` tokens a group when padded (a larger one alone)."""
    group: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        if group and (len(group) + 1) * sizes[index] > budget:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


@torch.no_grad()  # type: ignore[untyped-decorator]
def score_responses(
    model: RewardModel, items: Sequence[tuple[TokenIds, Sequence[TokenIds]]], token_budget: int = 4096
) -> list[list[float]]:
    """Scores of each item's responses, in order."""
    results: list[list[float]] = [[] for _ in items]
    sizes = [len(prompt) + sum(map(len, responses)) for prompt, responses in items]
    model.eval()
    for group in rows_by_tokens(sizes, token_budget):
        with autocast():
            scores = model(pack([items[i] for i in group])).tolist()
        for i in group:
            count = len(items[i][1])
            results[i], scores = scores[:count], scores[count:]
    return results


def autocast() -> torch.autocast:
    """Mixed precision as everywhere here: bfloat16 products over float32 weights."""
    return torch.autocast(DEVICE.type, torch.bfloat16)


def last_hidden(trunk: nn.Module, rows: PackedRows) -> Tensor:
    """Last hidden states (B, L, D) of a decoder without its output layer."""
    return trunk(
        input_ids=rows.input_ids.to(DEVICE),
        position_ids=rows.position_ids.to(DEVICE),
        attention_mask=rows.attention_mask.to(DEVICE),
        use_cache=False,
    ).last_hidden_state


def _trunk(model_dir: Path | str) -> nn.Module:
    return AutoModel.from_pretrained(str(model_dir), dtype=torch.float32, attn_implementation=ATTENTION).to(
        DEVICE
    )
