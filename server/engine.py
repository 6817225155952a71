"""The one file of the server that touches vLLM: the engine that records, its app, and weights in its memory.

It owns how vLLM is started and called. When weights change and whether they may serve is `server.swap`;
what is written down of an output is `server.recording`.
"""

import asyncio
import json
import logging
import os
import uuid
from argparse import Namespace
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from starlette.types import ASGIApp
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestOutputCollector

from registry.precision import matrix_dtype
from server.context import GENERATION, Generation
from server.recorder import Recorder
from server.recording import SAMPLING_FIELDS, Recording
from server.settings import ServerSettings
from server.swap import ProbeToken

logger = logging.getLogger(__name__)

MODEL_NAME = "policy"
_STAGING_POLL_SECONDS = 0.02
_PROBE_PROMPT = "Once upon a time there was a"
_PROBE_TOKENS = 8


class RecordingEngine(AsyncLLM):  # type: ignore[misc]  # vLLM is not type-checked
    """vLLM's engine, which also records each request that came through the gate.

    The logprob of each sampled token is always computed; a client that did not ask for logprobs does not
    see them. They are vLLM's `raw_logprobs`: of the model itself, before temperature and penalties.

    A request finds only keys and values that the same weights computed: a salt, which vLLM's prefix cache
    hashes along, names them, and is another after every change of weights.
    """

    _recorder: Recorder
    _version: str
    _collectors: dict[str, RequestOutputCollector | None]
    _hidden: set[str]
    _salt: str | None

    def attach(self, recorder: Recorder, version: str) -> None:
        """Set where records go, and the version that outputs without a label come from."""
        self._recorder = recorder
        self._version = version
        self._collectors = {}
        self._hidden = set()
        self.salt_anew()

    def attach_version(self, version: str) -> None:
        """Note the version that outputs without a label come from, after a swap."""
        self._version = version

    def salt_anew(self) -> None:
        """Let requests find no keys and values from before this call."""
        self._salt = uuid.uuid4().hex

    def salt_each(self) -> None:
        """Let no request find another's keys and values, until `salt_anew`: they may be of either weights."""
        self._salt = None

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As AsyncLLM's; what is yielded is recorded once it is finished, cut off or failed."""
        generation = GENERATION.get()
        part = generation.part(request_id) if generation is not None else None
        if generation is None or part is None:
            outputs: AsyncGenerator[RequestOutput, None] = super().generate(
                prompt, sampling_params, request_id, **kwargs
            )
            return outputs
        return self._recorded(generation, part, prompt, sampling_params, request_id, **kwargs)

    async def add_request(
        self, request_id: str, prompt: Any, *args: Any, **kwargs: Any
    ) -> RequestOutputCollector:
        """As AsyncLLM's, salted; keeps the collector, which holds the last words of an aborted request."""
        salted = {"prompt": prompt} if isinstance(prompt, str) else prompt
        if isinstance(salted, dict):
            salt = self._salt or uuid.uuid4().hex
            salted = {**salted, "cache_salt": f"{salt}/{salted.get('cache_salt', '')}"}
        collector = await super().add_request(request_id, salted, *args, **kwargs)
        if request_id in self._collectors:
            self._collectors[request_id] = collector
        if request_id in self._hidden:
            # Logprobs that only we read need no text of their tokens, which vLLM would decode one by one.
            for internal_id in self.output_processor.external_req_ids.get(request_id, ()):
                self.output_processor.request_states[internal_id].logprobs_processor.tokenizer = None
        return collector

    async def _recorded(
        self,
        generation: Generation,
        part: int,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        **kwargs: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        hide = params.num_logprobs is None
        if hide:
            params = params.clone()
            params.logprobs = 0
            # Cheaper, but the flag would also change the form of prompt logprobs that the client asked for.
            params.flat_logprobs = params.prompt_logprobs is None
        recording = Recording(
            generation,
            part,
            sampling={name: getattr(params, name) for name in SAMPLING_FIELDS},
            pieces=params.output_kind == RequestOutputKind.DELTA,
            version=self._version,
        )
        self._collectors[request_id] = None
        if hide and params.prompt_logprobs is None:
            self._hidden.add(request_id)
        outputs = super().generate(prompt, params, request_id, **kwargs)
        unfinished = "error"
        try:
            async for output in outputs:
                recording.add(output.prompt_token_ids, output.outputs)
                if output.finished:
                    # Before the last yield: a client may hang up as soon as it has the finish reason.
                    self._record(recording, unfinished)
                if hide:
                    _strip_logprobs(output)
                yield output
        except (asyncio.CancelledError, GeneratorExit):
            unfinished = "abort"
            await outputs.aclose()
            collector = self._collectors[request_id]
            if collector is not None and isinstance(collector.output, RequestOutput):
                recording.add(collector.output.prompt_token_ids, collector.output.outputs)
            raise
        finally:
            del self._collectors[request_id]
            self._hidden.discard(request_id)
            self._record(recording, unfinished)

    def _record(self, recording: Recording, unfinished: str) -> None:
        """Hand over once; a request never fails because its record does."""
        if recording.empty or recording.taken:
            return
        try:
            self._recorder.record(recording.completion(unfinished))
        except Exception:
            logger.exception("a completion could not be recorded")
            self._recorder.lost()


def _strip_logprobs(output: RequestOutput) -> None:
    for choice in output.outputs:
        if choice is not None:
            choice.logprobs = None
            choice.cumulative_logprob = None


class Engine:
    """A running engine with vLLM's own HTTP app in front, as `server.swap` and `server.app` use it."""

    def __init__(self, llm: RecordingEngine, app: Any, args: Namespace) -> None:
        self._llm = llm
        self._app = app
        parallel = llm.vllm_config.parallel_config
        self.dtype = str(llm.model_config.dtype).removeprefix("torch.")
        self.topology = f"{current_platform.device_type}-{self.dtype}-tp{parallel.tensor_parallel_size}"
        self.ranks = parallel.world_size
        self._args = args

    @classmethod
    async def start(
        cls, settings: ServerSettings, model_dir: Path, version: str, recorder: Recorder
    ) -> "Engine":
        """Load `model_dir` and build vLLM's app; blocks the event loop for tens of seconds."""
        args = arguments(settings, model_dir)
        engine_args = AsyncEngineArgs.from_cli_args(args)
        config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        llm = RecordingEngine.from_vllm_config(
            config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            disable_log_stats=engine_args.disable_log_stats,
        )
        assert isinstance(llm, RecordingEngine)
        try:
            llm.attach(recorder, version)
            await llm.collective_rpc("end_with", args=(os.getpid(),))
            await llm.collective_rpc("compute_logprobs_cheaply")
            await llm.reset_mm_cache()
            tasks = await llm.get_supported_tasks()
            app = build_app(args, tasks, llm.model_config)
            await init_app_state(llm, app.state, args, tasks)
            # vLLM's error handlers tell this server to exit when the engine is dead; ours watches by itself.
            app.state.server = SimpleNamespace(should_exit=False)
        except BaseException:
            llm.shutdown(timeout=0)
            raise
        return cls(llm, app, args)

    @property
    def app(self) -> ASGIApp:
        """VLLM's HTTP app."""
        app: ASGIApp = self._app
        return app

    @asynccontextmanager
    async def lifespan(self) -> AsyncGenerator[None, None]:
        """Run what vLLM's app does while it serves; a mounted app's own lifespan is never entered."""
        async with self._app.router.lifespan_context(self._app):
            yield

    @property
    def dead(self) -> bool:
        """Whether the engine's process has ended."""
        return bool(self._llm.errored)

    async def pause(self) -> None:
        """Freeze running requests where they are.

        They keep their keys and values, and go on from them with the weights that are there then. What a
        multimodal model has encoded is kept apart from requests, so there all is dropped and computed again.
        """
        self._llm.salt_each()
        await self._llm.pause_generation(mode="keep", clear_cache=self._llm.model_config.is_multimodal_model)

    async def resume(self) -> None:
        """Let requests run on."""
        await self._llm.resume_generation()

    async def load(self, model_dir: Path) -> None:
        """Replace the weights in place. A failure can leave some old and some new ones."""
        await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(model_dir)})
        await self._llm.collective_rpc("refresh_packed_weights")

    async def stage(self, model_dir: Path) -> dict[str, str] | None:
        """Bring weights in beside those in service while requests run; None if this engine can only `load`.

        Returns what `fingerprint` will say once they are exchanged. Raises ValueError for a checkpoint that
        has not the tensors of the model in service.
        """
        if not all(await self._llm.collective_rpc("stage_weights", args=(str(model_dir),))):
            await self.unstage()
            return None
        while True:
            (found,) = await self._llm.collective_rpc("staged_fingerprint")
            if isinstance(found, str):
                raise ValueError(found)
            if found is not None:
                return dict(found)
            await asyncio.sleep(_STAGING_POLL_SECONDS)

    async def exchange(self) -> None:
        """Put staged weights in place, and those in service where they were: a second call undoes it."""
        await self._llm.collective_rpc("exchange_weights")

    async def unstage(self) -> None:
        """Free the weights that are not in service."""
        await self._llm.collective_rpc("drop_staged_weights")

    async def fingerprint(self) -> dict[str, str]:
        """Return what `registry.proof` finds, by `<tensor>`, or by `<rank>/<tensor>` with several ranks."""
        ranks: list[dict[str, str]] = await self._llm.collective_rpc("weight_fingerprint")
        if len(ranks) == 1:
            return ranks[0]
        return {f"{i}/{name}": value for i, found in enumerate(ranks) for name, value in found.items()}

    async def probe(self) -> list[ProbeToken]:
        """Answer a fixed prompt greedily, beside the requests that run; it is not recorded."""
        params = SamplingParams(
            temperature=0,
            max_tokens=_PROBE_TOKENS,
            ignore_eos=True,
            logprobs=2,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        (output,) = [
            found async for found in self._llm.generate(_PROBE_PROMPT, params, f"probe-{uuid.uuid4().hex}")
        ]
        choice, answer = output.outputs[0], []
        for token, ranked in zip(choice.token_ids, choice.logprobs, strict=True):
            best, second = sorted((one.logprob for one in ranked.values()), reverse=True)[:2]
            answer.append(ProbeToken(token, ranked[token].logprob, best - second))
        return answer

    async def reset_caches(self) -> None:
        """Let new requests find nothing that other weights computed."""
        self._llm.salt_anew()

    async def label(self, version: str) -> None:
        """Name the weights, as they stand in the spans of what is generated from now on."""
        await self._llm.update_weight_version(version)
        self._llm.attach_version(version)

    def close(self) -> None:
        """End the engine's process; requests that still run are aborted."""
        self._llm.shutdown(timeout=0)


def arguments(settings: ServerSettings, model_dir: Path) -> Namespace:
    """VLLM's own command line for this replica, checked by vLLM. Raises ValueError for a wrong argument."""
    options: dict[str, Any] = {
        "model": str(model_dir),
        "served_model_name": MODEL_NAME,
        "max_model_len": settings.max_model_len,
        "worker_extension_cls": "registry.worker.WorkerExtension",
        "disable_fastapi_docs": True,
        "allowed_origins": [],
    }
    if current_platform.is_cpu():
        # Bytes, because VLLM_CPU_KVCACHE_SPACE takes whole GiB only.
        options |= {
            "enforce_eager": True,
            "dtype": matrix_dtype(),
            "kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30),
            # vLLM 0.32 on a CPU dies when a request with a seed is prefilled in chunks: it rewinds the
            # generator's offset, which CPU generators have not.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(8192, settings.max_model_len),
        }
    options |= settings.vllm_arguments
    parser = FlexibleArgumentParser(exit_on_error=False)
    words = [word for name, value in options.items() for word in _words(name, value)]
    try:
        args = make_arg_parser(parser).parse_args(words)
    except SystemExit as error:
        raise ValueError(f"vLLM refuses its arguments {options}") from error
    validate_parsed_serve_args(args)
    assert isinstance(args, Namespace)
    return args


def _words(name: str, value: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    match value:
        case True:
            return [option]
        case False:
            return [f"--no-{name.replace('_', '-')}"]
        case dict() | list():
            return [option, json.dumps(value)]
        case _:
            return [option, str(value)]
