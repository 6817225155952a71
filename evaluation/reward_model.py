"""The reward model: a decoder with an ensemble of scalar heads, and how responses are scored with it.

Owns the module, its file format and the packing of one prompt with its K responses into one row. Fitting
it is `training/reward_model.py`'s; what a score decides is the gate's or PPO's.
Shapes: B rows (prompts), L packed length, T length, K responses, H heads, D width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

from registry.precision import matrix_dtype

TokenIds = Sequence[int]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# With the short rows of training, plain attention is a fifth faster on a CPU, forward and backward.
ATTENTION = "eager" if DEVICE.type == "cpu" else "sdpa"


class UnsuitableBackbone(ValueError):  # noqa: N818
    """A model that can't be a reward model's trunk; the message says why."""


class RewardModel(nn.Module):  # type: ignore[misc]
    """r_h(x, y): a decoder's last hidden state at the last token of the response, through H linear heads.

    The heads are an ensemble on one trunk: their mean is the score, their spread says how far it can be
    trusted. `offset` and `scale` (H,) standardise each head (Huang et al. 2024, arXiv 2403.17031, detail 13:
    rewards are normalised before PPO): all heads vary alike, and the mean has deviation 1, over the responses
    that the model was fitted on; where its zero lies is decided by `training.reward_model.fit`.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, backbone: nn.Module, heads: int = 1) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.hidden_size, heads, device=DEVICE)
        # From zero: scores of a random head would be noise that the trunk has to unlearn first. Bootstraps
        # tell the heads apart; with small random weights most of their spread was still noise after an epoch.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("offset", torch.zeros(heads, device=DEVICE))
        self.register_buffer("scale", torch.ones(heads, device=DEVICE))

    @classmethod
    def from_decoder(cls, model_dir: Path | str, heads: int = 1) -> "RewardModel":
        """Make a reward model that starts from a language model's trunk, with new heads.

        Raises UnsuitableBackbone if the trunk's attention can't be packed.
        """
        model = cls(_trunk(model_dir), heads)
        _check_packing(model.backbone)
        return model

    @classmethod
    def load(cls, directory: Path, trunk_device: torch.device = DEVICE) -> "RewardModel":
        """Read a fitted reward model from where `save` put it."""
        head = load_file(directory / "head.safetensors")
        model = cls(_trunk(directory / "backbone", trunk_device), heads=len(head["head.weight"]))
        model.load_state_dict(head, strict=False)
        return model

    def save(self, directory: Path) -> None:
        """Write `backbone/` (a Hugging Face directory) and `head.safetensors`."""
        self.backbone.save_pretrained(directory / "backbone")
        head = {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.")}
        save_file({name: value.contiguous() for name, value in head.items()}, directory / "head.safetensors")

    @property
    def heads(self) -> int:
        """The number of heads, H."""
        return int(self.head.out_features)

    def hidden(self, rows: "PackedRows") -> Tensor:
        """Last hidden states of packed rows, (B, L, D)."""
        return last_hidden(self.backbone, rows)

    def head_scores(self, hidden: Tensor) -> Tensor:
        """Each head's standardised score of hidden states (…, D) -> (…, H)."""
        # In float32 under autocast too: bfloat16 would round away what the heads differ in.
        with torch.autocast(DEVICE.type, enabled=False):
            return (self.head(hidden.float()) - self.offset) / self.scale

    def score(self, hidden: Tensor) -> Tensor:
        """Scores of hidden states (…, D) -> (…): the mean over the heads."""
        return self.head_scores(hidden).mean(-1)

    def spread(self, hidden: Tensor) -> Tensor:
        """How far the heads disagree on hidden states (…, D) -> (…): their population standard deviation."""
        return self.head_scores(hidden).std(-1, unbiased=False)

    def reward(self, hidden: Tensor, spread_penalty: float) -> Tensor:
        """Pay for hidden states (…, D) -> (…): the score less a multiple of the spread.

        Uncertainty-weighted optimisation (Coste et al. 2023, arXiv 2310.02743), which takes the
        variance; the deviation has the score's own unit, so the penalty means the same at any scale.
        """
        return self.score(hidden) - spread_penalty * self.spread(hidden)

    def forward(self, rows: "PackedRows") -> Tensor:
        """Each head's scores of all responses of the rows, in row order, (sum of K, H)."""
        row, last = rows.last_tokens()
        return self.head_scores(self.hidden(rows)[row, last])


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
def head_scores_of_responses(
    model: RewardModel, items: Sequence[tuple[TokenIds, Sequence[TokenIds]]], token_budget: int = 4096
) -> list[Tensor]:
    """Each head's scores of each item's responses, in order: (K, H) an item, on the CPU."""
    results = [torch.empty(0)] * len(items)
    sizes = [len(prompt) + sum(map(len, responses)) for prompt, responses in items]
    model.eval()
    for group in rows_by_tokens(sizes, token_budget):
        with autocast():
            scores = model(pack([items[i] for i in group])).cpu()
        for index, own in zip(group, scores.split([len(items[i][1]) for i in group]), strict=True):
            results[index] = own
    return results


def score_responses(
    model: RewardModel, items: Sequence[tuple[TokenIds, Sequence[TokenIds]]], token_budget: int = 4096
) -> list[list[float]]:
    """Scores of each item's responses, in order."""
    return [scores for scores, _ in scores_and_spreads(model, items, token_budget)]


def scores_and_spreads(
    model: RewardModel, items: Sequence[tuple[TokenIds, Sequence[TokenIds]]], token_budget: int = 4096
) -> list[tuple[list[float], list[float]]]:
    """Scores of each item's responses and how far the heads disagree on them, in order."""
    return [
        (own.mean(-1).tolist(), own.std(-1, unbiased=False).tolist())
        for own in head_scores_of_responses(model, items, token_budget)
    ]


def autocast() -> torch.autocast:
    """Mixed precision as everywhere here: products in `matrix_dtype` over float32 weights."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=matrix_dtype() == "bfloat16")


def last_hidden(trunk: nn.Module, rows: PackedRows) -> Tensor:
    """Last hidden states (B, L, D) of a decoder without its output layer."""
    return trunk(
        input_ids=rows.input_ids.to(DEVICE),
        position_ids=rows.position_ids.to(DEVICE),
        attention_mask=rows.attention_mask.to(DEVICE),
        use_cache=False,
    ).last_hidden_state


def _trunk(model_dir: Path | str, device: torch.device = DEVICE) -> nn.Module:
    return AutoModel.from_pretrained(str(model_dir), dtype=torch.float32, attn_implementation=ATTENTION).to(
        device
    )


@torch.no_grad()  # type: ignore[untyped-decorator]
def _check_packing(trunk: nn.Module) -> None:
    """Raise UnsuitableBackbone unless responses in one row have the hidden states of separate sequences.

    Not so where positions come from the row itself (ALiBi: BLOOM, MPT), where a layer keeps a mask of its own
    (GPT-Neo's local attention) or a state (Mamba). It is tried, since no list of architectures stays right.
    """
    prompt, responses = [3, 5, 7, 9, 11], [[4, 6, 8], [10, 12]]
    trunk.eval()
    try:
        rows = pack([(prompt, responses)])
        row, last = rows.last_tokens()
        packed = last_hidden(trunk, rows)[row, last]
        separate = torch.stack(
            [
                trunk(input_ids=torch.tensor([prompt + response], device=DEVICE)).last_hidden_state[0, -1]
                for response in responses
            ]
        )
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UnsuitableBackbone(f"{type(trunk).__name__} takes no packed rows: {error}") from error
    if not (packed - separate).abs().max() <= 1e-3 * separate.abs().max():
        raise UnsuitableBackbone(
            f"{type(trunk).__name__} scores a response otherwise when it shares a row with another one: "
            "its attention does not keep to the mask and the positions that it is given"
        )
