"""One PPO update of ours beside one of unmodified TRL 1.12.0's: CPU seconds, phases, peak memory.

Equal work: the same model, prompts of 48 tokens, 16 responses of 48 tokens, epochs, optimiser steps and
weights of the policy that learn. TRL cannot do without a critic as large as the policy; ours is the default
one, a value head on the reward model. Each contender runs in a process of its own, in turn, all in one run;
memory is the resident size of the process with its children. Run it with `make bench-ppo`;
about twenty minutes a turn on two cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
EPISODES, PROMPT, RESPONSE = 16, 48, 48
UPDATES, WARMING_UP = 4, 2
"""The first updates are not counted: until the optimiser's state is there memory grows, which costs time."""

CASES: dict[str, dict[str, Any]] = {
    "1 epoch": {"epochs": 1, "rank": 0},
    "1 epoch, LoRA of rank 16": {"epochs": 1, "rank": 16},
    "TRL's defaults: float32, 4 epochs": {"dtype": "float32", "epochs": 4, "rank": 0},
}
"""Where a case has no `dtype`, TRL gets the one that ours takes on this machine."""
OURS = {"ours, one response a prompt": 1, "ours, four responses a prompt (default)": 4}
STOCK = "TRL"


def main() -> None:
    """Run all contenders in turn and print the figures as JSON, or one of them (`--child`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="how often each contender has its turn")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "CONTENDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_contender(*arguments.child)))
        return
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for round_ in range(arguments.rounds):
        for case in CASES:
            for contender in (STOCK, *OURS):
                print(f"turn {round_ + 1}: {case}: {contender}", file=sys.stderr, flush=True)
                found = _in_a_process(case, contender)
                results.setdefault(case, {}).setdefault(contender, []).append(found)
    from registry.precision import matrix_dtype

    summaries = {case: _summary(of) for case, of in results.items()}
    print(json.dumps({"dtype": matrix_dtype(), **summaries}, indent=1))


def _summary(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over all counted updates, and TRL's over ours."""
    medians: dict[str, dict[str, Any]] = {}
    for contender, turns in results.items():
        updates = [update for turn in turns for update in turn["updates"]]
        medians[contender] = {
            "cpu_seconds": statistics.median(update["cpu"] for update in updates),
            "wall_seconds": statistics.median(update["wall"] for update in updates),
            "phases_wall": {
                phase: statistics.median(update["phases"][phase] for update in updates)
                for phase in updates[0]["phases"]
            },
            "peak_gib": max(turn["peak_gib"] for turn in turns),
            "updates_counted": len(updates),
        }
    stock = medians[STOCK]
    for contender in OURS:
        mine = medians[contender]
        mine["times_faster_cpu"] = stock["cpu_seconds"] / mine["cpu_seconds"]
        mine["times_faster_wall"] = stock["wall_seconds"] / mine["wall_seconds"]
        mine["share_of_peak_memory"] = mine["peak_gib"] / stock["peak_gib"]
    return medians


def _in_a_process(case: str, contender: str) -> dict[str, Any]:
    # The same allocator settings as the trainer's own process has: TRL gains from them, too.
    from instructloop import processes

    command = [sys.executable, "-m", "tests.benchmarks.ppo_against_trl", "--child", case, contender]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=processes.environment(os.environ)
    )
    peak, over = [0], threading.Event()
    watcher = threading.Thread(target=_watch_memory, args=(process.pid, peak, over))
    watcher.start()
    output, _ = process.communicate()
    over.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"{case}: {contender} ended with {process.returncode}")
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found | {"peak_gib": peak[0] / 2**30}


def _watch_memory(pid: int, peak: list[int], over: threading.Event) -> None:
    while not over.wait(0.2):
        try:
            process = psutil.Process(pid)
            resident = sum(p.memory_info().rss for p in [process, *process.children(recursive=True)])
        except psutil.NoSuchProcess:
            continue
        peak[0] = max(peak[0], resident)


class _Clock:
    """CPU (with children's) and wall seconds of each update, and the wall seconds of its phases."""

    def __init__(self) -> None:
        self.updates: list[dict[str, Any]] = []
        self._phases: dict[str, float] = {}
        self._start = self._now()

    def _now(self) -> tuple[float, float]:
        process = psutil.Process()
        cpu = 0.0
        for one in [process, *process.children(recursive=True)]:
            times = one.cpu_times()
            cpu += times.user + times.system
        return cpu, time.monotonic()

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        self._phases.setdefault(phase, 0.0)

        def call(*arguments: Any, **keywords: Any) -> Any:
            start = time.monotonic()
            try:
                return function(*arguments, **keywords)
            finally:
                self._phases[phase] += time.monotonic() - start

        return call

    def end_update(self) -> None:
        now = self._now()
        cpu, wall = (after - before for after, before in zip(now, self._start, strict=True))
        self.updates.append({"cpu": cpu, "wall": wall, "phases": dict(self._phases)})
        self._phases = dict.fromkeys(self._phases, 0.0)
        self._start = self._now()


def _contender(case: str, contender: str) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer

    from evaluation.contest import Prompt
    from instructloop import model
    from instructloop.demo_instructions import training

    torch.manual_seed(0)
    model_dir = model.ensure_default_model(ROOT / ".instructloop" / "test-model")
    tokenizer = AutoTokenizer.from_pretrained(str(model_dir))
    prompts = []
    for i, instruction in enumerate(training()):
        messages = [{"role": "user", "content": instruction.text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if len(ids) >= PROMPT:
            prompts.append(Prompt(str(i), list(ids)[-PROMPT:]))
    if len(prompts) < EPISODES:
        raise SystemExit(f"only {len(prompts)} instructions have {PROMPT} tokens")
    run = _stock if contender == STOCK else _ours
    with tempfile.TemporaryDirectory() as work:
        updates = run(
            model_dir,
            tokenizer,
            prompts[:EPISODES],
            case=CASES[case],
            work=Path(work),
            each=OURS.get(contender, 1),
        )
    return {"updates": updates[WARMING_UP:]}


def _ours(
    model_dir: Path, tokenizer: Any, prompts: list[Any], *, case: dict[str, Any], work: Path, each: int
) -> list[dict[str, Any]]:
    from evaluation.reward_model import RewardModel
    from evaluation.sampler import VllmSampler
    from training.policy import load_policy, with_adapter
    from training.ppo import PPO
    from training.rollouts import Rollouts
    from training.settings import TrainingSettings

    class FullLength(VllmSampler):
        """Goes on to the full length, as TRL's generation without a stop token does."""

        def _parameters(self, *arguments: Any) -> Any:
            parameters = super()._parameters(*arguments)
            parameters.ignore_eos = True
            return parameters

    settings = TrainingSettings(
        ppo_updates=UPDATES,
        ppo_batch=EPISODES,
        ppo_samples_per_prompt=each,
        ppo_mini_batches=1,
        ppo_epochs=case["epochs"],
        ppo_response_tokens=RESPONSE,
        ppo_checkpoint_updates=1000,
    )
    sampler = FullLength(model_dir, max_model_len=256, kv_cache_gib=0.25)
    policy = load_policy(model_dir)
    ppo = PPO(
        policy=with_adapter(policy, case["rank"]) if case["rank"] else policy,
        tokenizer=tokenizer,
        reward_model=RewardModel.from_decoder(model_dir),
        prompts=prompts,
        rollouts=Rollouts(sampler, tokenizer, work / "rollout", max_tokens=RESPONSE, temperature=1.0),
        settings=settings,
        work=work,
        report=lambda step, steps, figures: None,
    )
    clock = _Clock()
    phases = {
        "_roll_out": "rollout",
        "_check_engine": "check of the engine",
        "_reference_logprobs": "reference",
        "_rewards": "reward and values",
        "_optimise": "optimise",
    }
    for method, phase in phases.items():
        setattr(ppo, method, clock.timed(phase, getattr(ppo, method)))
    end_update = ppo._end_update

    def end(*arguments: Any) -> None:
        end_update(*arguments)
        clock.end_update()

    ppo._end_update = end
    ppo.train()
    sampler.close()
    return clock.updates


def _stock(
    model_dir: Path, tokenizer: Any, prompts: list[Any], *, case: dict[str, Any], work: Path, each: int
) -> list[dict[str, Any]]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    from registry.precision import matrix_dtype

    dtype = getattr(torch, case.get("dtype", matrix_dtype()))
    clock = _Clock()

    class EndOfUpdate(TrainerCallback):
        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            clock.end_update()

    def scorer() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(str(model_dir), num_labels=1, dtype=dtype)

    # Timed, not changed: what is left of an update is the optimisation.
    ppo_trainer.batch_generation = clock.timed("rollout", ppo_trainer.batch_generation)
    ppo_trainer.get_reward = clock.timed("reward and values", ppo_trainer.get_reward)
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(work),
            per_device_train_batch_size=EPISODES,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=case["epochs"],
            local_rollout_forward_batch_size=EPISODES,
            total_episodes=EPISODES * UPDATES,
            response_length=RESPONSE,
            temperature=1.0,
            learning_rate=1e-5,
            missing_eos_penalty=1.0,
            num_sample_generations=0,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=dtype),
        ref_model=None,
        reward_model=scorer(),
        value_model=scorer(),
        # As ours, see training.policy.with_adapter.
        peft_config=LoraConfig(r=case["rank"], lora_alpha=2 * case["rank"], target_modules="all-linear")
        if case["rank"]
        else None,
        train_dataset=Dataset.from_dict({"input_ids": [prompt.token_ids for prompt in prompts]}),
        callbacks=[EndOfUpdate()],
    )
    with open(os.devnull, "w") as silence:
        stdout, sys.stdout = sys.stdout, silence
        clock._start = clock._now()
        trainer.train()
        sys.stdout = stdout
    for update in clock.updates:
        update["phases"]["the rest: reference, optimise"] = update["wall"] - sum(update["phases"].values())
    return clock.updates


if __name__ == "__main__":
    main()
