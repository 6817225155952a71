"""What a launcher may ask for, and that sharding leaves alone what is in one process.

Models that are really divided are in tests/integration/test_several_processes.py.
"""

import os
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from unit.training.tiny import tiny_model

from training import processes, sharding
from training.policy import load_policy

CONFIGURATIONS = Path(__file__).resolve().parents[3] / "docker" / "accelerate"
DIVIDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment of the test's own, without a launcher's variables."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    monkeypatch.setattr(os, "environ", own)
    return own


def _launched(name: str) -> dict[str, str]:
    """The variables that `accelerate launch` gives its processes for a shipped configuration."""
    file = str(CONFIGURATIONS / f"{name}.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", file, "script.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    if not arguments.use_deepspeed:
        found = prepare_multi_gpu_env(arguments)
    else:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, found = prepare_deepspeed_cmd_env(arguments)
    return {name: value for name, value in found.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.mark.parametrize(
    ("name", "kind", "divided"),
    [("data_parallel", "MULTI_GPU", False), ("fsdp", "FSDP", True), ("zero3", "DEEPSPEED", True)],
)
def test_the_shipped_configurations_load_and_are_followed(
    name: str, kind: str, divided: bool, environment: dict[str, str]
) -> None:
    config = load_config_from_file(str(CONFIGURATIONS / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes) == (kind, 2)
    environment |= _launched(name)
    assert (environment.get("ACCELERATE_USE_DEEPSPEED") == "true") == (kind == "DEEPSPEED")
    processes._follow_launcher()
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == divided
    assert "ACCELERATE_USE_DEEPSPEED" not in environment


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version: 1"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, "fsdp_reshard_after_forward: false"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: true"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing: true"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading: true"),
    ],
)
def test_what_would_not_be_followed_is_refused_by_name(
    more: dict[str, str], named: str, environment: dict[str, str]
) -> None:
    environment |= DIVIDED
    processes._follow_launcher()
    environment |= more
    with pytest.raises(processes.LaunchRefused, match=named):
        processes._follow_launcher()


@pytest.mark.parametrize(
    "more",
    [
        {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
        {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
        {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"},
        {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json"},
    ],
)
def test_deepspeed_beyond_zero3_is_refused(more: dict[str, str], environment: dict[str, str]) -> None:
    environment |= ZERO3 | more
    with pytest.raises(processes.LaunchRefused, match=r"zero3\.yaml or fsdp\.yaml"):
        processes._follow_launcher()


def test_a_process_by_itself_divides_nothing(tmp_path: Path, environment: dict[str, str]) -> None:
    environment |= DIVIDED
    model = load_policy(tiny_model(tmp_path), processes.loading_device())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    empty = sharding.outline(model)
    assert all(parameter.is_meta for parameter in empty.parameters())
    sharding.shard(model)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert sharding.filled(empty, model) is model
    assert sharding.gathered({"weights": [*before.values()]})["weights"] == [*before.values()]
    assert processes.in_step([[1], [2]], [0]) == [([1], 1), ([2], 1)]


@pytest.mark.parametrize("limit", [0.5, 1e3])
def test_gradients_are_clipped_as_torch_does_it(limit: float) -> None:
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.zeros(n)) for n in (3, 5, 2)] for _ in range(2))
    for mine, other in zip(ours[:2], theirs[:2], strict=True):  # the last one has no gradient
        mine.grad = torch.randn_like(mine)
        other.grad = mine.grad.clone()
    norm = sharding.clip_gradients(ours, limit)
    assert norm == torch.nn.utils.clip_grad_norm_(theirs, limit)
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        assert torch.equal(mine.grad, other.grad)
    assert ours[2].grad is None
