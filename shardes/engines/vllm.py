"""vLLM as an engine: its model computes, over its own parameters; their values come from outside.

vLLM runs in the replica's process and process group. Its weights are written in place and never
replaced, because CUDA graphs hold their addresses. `check_writes` sees at every start that what is
written is what answers.
"""

import os
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

from shardes.config.schema import Config, Decode, Gather, Offload, Restore, ShardingConfig
from shardes.distributed.environment import quiet
from shardes.distributed.world import World
from shardes.engines.vllm_adapters import EMBEDDINGS, Adapters, Slots
from shardes.engines.vllm_regions import (
    NoPlace,
    Piece,
    count_once,
    find_pieces,
    find_shards,
    parameters,
)
from shardes.errors import ConfigError, RunError, described
from shardes.noise import add_noise
from shardes.sharding.regions import ParameterShard
from shardes.sharding.weight_files import WeightFiles

OLDEST = (0, 32)
MARGIN = 16  # tokens beyond the longest request
LOAD_FORMAT = "shardes"
REMEDIES = {  # by what is in a message of vLLM
    "cache blocks": "raise vllm.cache_size: ",
    "KV cache": "raise vllm.cache_size or lower vllm.max_model_len: ",
    "LoRA": "set es.members_per_batch=1: ",
}
LAYER_NUMBER = re.compile(r"\.\d+\.")
_opened: list[Any] = []  # vLLM's engines of this process


def check_vllm(config: Config) -> None:
    """Raise ConfigError for settings that engine=vllm does not have, or without a usable vLLM."""
    check_sharding(config.sharding)
    if config.es.restore is Restore.subtract:
        raise ConfigError("es.restore=subtract: engine=vllm needs the exact center; use copy")
    if config.generation.decode is Decode.graph:
        raise ConfigError(
            "generation.decode=graph: engine=vllm decodes by itself; leave it out, and see "
            "vllm.enforce_eager"
        )
    if not find_spec("vllm"):
        raise ConfigError(
            "engine=vllm: vLLM is not installed; pip install 'shardes[vllm]', or see docs/vllm.md"
        )
    found = _version()
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ConfigError(f"engine=vllm: vLLM is {found}; it must be at least {oldest}")
    _import()


def _import() -> None:
    """Import vLLM. What it fails to import it keeps with the frames of that moment, so the weights
    must not be there yet.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"  # which it would send to its makers
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    try:
        with quiet():
            from vllm import LLM  # noqa: F401
    except Exception as error:  # of another torch, or of a library that is missing
        raise ConfigError(
            f"engine=vllm: vLLM {_version()} cannot be imported: {described(error)}; install it "
            "again, or see docs/vllm.md"
        ) from error


def check_sharding(sharding: ShardingConfig) -> None:
    """Raise ConfigError for ways of sharding that engine=vllm does not have."""
    for key, value, holds, demand in (
        ("shard", sharding.shard, sharding.shard == 1, "has no shard axis; use sharding.tensor,"),
        ("gather", "layer", sharding.gather is Gather.member, "gathers nothing; leave it out,"),
        ("offload", "cpu", sharding.offload is Offload.none, "offloads nothing; leave it out,"),
    ):
        if not holds:
            raise ConfigError(f"sharding.{key}={value}: engine=vllm {demand} or another engine")


def check_processors(names: str) -> None:
    """Raise ConfigError if greedy decoding would apply logits processors of these names."""
    if names:
        raise ConfigError(
            f"generation.logits_processors=checkpoint: engine=vllm does not apply {names}; set "
            "generation.logits_processors=none, or use another engine"
        )


def check_context(
    config: Config, module: PreTrainedModel, split: str, prompts: Sequence[Sequence[int]]
) -> None:
    """Raise ConfigError if a prompt with its longest response does not fit vLLM's context."""
    context = config.vllm.max_model_len or own_context(module)
    new_tokens, longest = config.generation.max_new_tokens, max(map(len, prompts), default=0)
    if context and longest + new_tokens >= context:
        raise ConfigError(
            f"generation.max_new_tokens={new_tokens}: the longest prompt of {split} has {longest} "
            f"tokens, and with engine=vllm both must be fewer than {context} (vllm.max_model_len, "
            "or the model's context)"
        )


def check_platform(device: torch.device) -> None:
    """Raise ConfigError if the vLLM that is installed does not compute on the run's device."""
    from vllm.platforms import current_platform

    known = current_platform.device_type
    if known != device.type:
        raise ConfigError(
            f"engine=vllm: vLLM {_version()} computes on {known or 'no device of this host'}, and "
            f"the run on {device.type}; install vLLM's build for it"
        )


def own_context(module: PreTrainedModel) -> int | None:
    """The tokens that a model was made for; None: its config does not say."""
    own = getattr(module.config.get_text_config(), "max_position_embeddings", None)
    return own if isinstance(own, int) else None


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of an unknown version"


def release() -> None:
    """Shut vLLM down, with its process groups; for a process that outlives a run."""
    while _opened:
        _opened.pop().engine_core.shutdown()
    if state := sys.modules.get("vllm.distributed.parallel_state"):
        state.cleanup_dist_env_and_memory()


class VLLMEngine:
    """A causal language model in vLLM: implements `engines.Engine`.

    Args:
        module: the model of transformers on the meta device, in its dtype.
        files: those of the base model, whose names `load_weights` of vLLM's model understands.
        slots: for adapters, if requests are to have them.
        longest: tokens of the longest prompt and its response; 0: as many as the model's context.

    Attributes:
        llm: vLLM's engine, for requests.
        adapters: those of requests; None: they have none.
        requests: vLLM's `LoRARequest`s of the members that answer side by side.
        context: of the longest request, prompt and response, in tokens.

    Raises:
        ConfigError: vLLM cannot run the model, or its parameters are not the model's.
    """

    def __init__(
        self,
        config: Config,
        module: PreTrainedModel,
        files: WeightFiles,
        world: World,
        slots: Slots | None = None,
        longest: int = 0,
    ):
        _import()
        from vllm import LLM

        check_platform(world.device)
        self._config, self.device = config, world.device
        opened, self._derive = _of_device(world)
        self._model: Any = None  # set by the loader
        self._pieces: list[Piece] = []
        # On a CPU vLLM looks at all that modules have, also at what torch deprecates.
        warnings.filterwarnings("ignore", "`torch.distributed.reduce_op` is", FutureWarning)
        try:
            with opened, _loader(self._load(module.dtype, files)):
                llm = LLM(
                    str(files.directory),
                    max_model_len=config.vllm.max_model_len or _context(module, longest),
                    **_arguments(config),
                    **(slots.arguments() if slots else {}),
                )
            _opened.append(llm.llm_engine)
            _release_queue()
            self.llm = llm.llm_engine
            self.context = self.llm.model_config.max_model_len
            self.adapters = Adapters(self.llm) if slots else None
            self.requests: list[Any] = []
            self._check_storage()
            found = find_shards(self._model, self._pieces, module, files)
            self.shards = [shard for _, shard in found.values()]
            count_once(self.shards, self.device)
        except NoPlace as error:
            raise ConfigError(
                f"model.path={config.model.path}: {error}; use another engine"
            ) from None
        except Exception as error:  # whatever vLLM meets
            remedy = next((text for word, text in REMEDIES.items() if word in str(error)), "")
            raise ConfigError(
                f"engine=vllm: vLLM cannot run {config.model.path}: {remedy}{described(error)}"
            ) from error
        self._kinds = _kinds(found)

    def _load(self, dtype: torch.dtype, files: WeightFiles) -> Callable[[Any], None]:
        def load(model: Any) -> None:
            shapes = {name: info.shape for name, info in files.used.items()}
            self._pieces = find_pieces(model, shapes, dtype)
            self._model = model
            model.embedding_modules = EMBEDDINGS  # which may have adapters
            self._storage = {
                name: (param.data_ptr(), param.shape) for name, param in model.named_parameters()
            }
            for param in model.parameters():
                param.data.zero_()  # padding stays so

        return load

    def _check_storage(self) -> None:
        """Refuse a model whose parameters vLLM replaced after loading, by packed ones or others."""
        params = parameters(self._model)
        for name, storage in self._storage.items():
            param = params.get(name)
            if param is None or (param.data_ptr(), param.shape) != storage:
                raise NoPlace(f"vLLM packs {name} after loading, and computes with a copy")

    def take_weights(self) -> None:
        """Let vLLM compute with the values that the shards have now, where it keeps copies.

        Raises:
            RunError: its prefix cache, which other weights filled, is still there.
        """
        self._derive(self._model)
        if not self.llm.reset_prefix_cache():
            raise RunError("engine=vllm: vLLM keeps its prefix cache, which other weights filled")

    def check_writes(self, log_probs: Callable[[], list[float]]) -> None:
        """See that vLLM computes with what is written to the shards. Their values end as zero.

        Of each kind of parameter one is changed, which must change what a prompt gives; the former
        values must give the former numbers, to the bit.

        Args:
            log_probs: log-probabilities of some tokens with the weights that the shards have.

        Raises:
            ConfigError: it does not; the message says of which parameter.
        """
        with self.random_weights():
            first = log_probs()
            for name, shards in self._kinds.items():
                kept = [shard.values.clone() for shard in shards]
                for shard in shards:
                    _randomize(shard, 1)
                changed = log_probs()
                for shard, values in zip(shards, kept, strict=True):
                    shard.values.copy_(values)
                if changed == first:
                    raise ConfigError(
                        self._blind(f"does not compute with what is written to {name}")
                    )
            if log_probs() != first:
                raise ConfigError(
                    self._blind("does not give the same numbers for the same weights")
                )

    @contextmanager
    def random_weights(self) -> Iterator[None]:
        """A context in which the shards have random values. They end as zero."""
        for shard in self.shards:
            _randomize(shard, 0)
        yield
        for shard in self.shards:
            shard.values.zero_()

    def _blind(self, verdict: str) -> str:
        if self._config.vllm.enforce_eager:
            return f"engine=vllm: vLLM {_version()} {verdict}; use another engine"
        return f"vllm.enforce_eager=false: vLLM {_version()} {verdict}; set vllm.enforce_eager=true"


def _of_device(world: World) -> tuple[AbstractContextManager[None], Callable[[Any], None]]:
    """The context in which vLLM is opened, and what derives from weights what it computes with."""
    if world.device.type != "cpu":
        return nullcontext(), lambda model: None
    from shardes.engines import vllm_cpu

    vllm_cpu.compute_in_place()
    return vllm_cpu.own_shared_memory(world), vllm_cpu.pack_experts


def _context(module: PreTrainedModel, longest: int) -> int | None:
    """The tokens that the longest request needs, with room for a prompt of `check_writes`."""
    room = longest + MARGIN
    return min(room, own_context(module) or room) if longest else None


def _arguments(config: Config) -> dict[str, Any]:
    """What vLLM's engine is told of the run."""
    return dict(
        runner="generate",  # and not what files beside the model's make of it
        config_format="hf",
        skip_tokenizer_init=True,
        trust_remote_code=config.model.trust_remote_code,
        dtype=config.model.dtype.value,
        seed=0,
        load_format=LOAD_FORMAT,
        distributed_executor_backend="external_launcher",
        tensor_parallel_size=config.sharding.tensor,
        async_scheduling=False,
        generation_config="vllm",
        enforce_eager=config.vllm.enforce_eager,
        kv_cache_memory_bytes=int(config.vllm.cache_size * 1e9),
    )


def _release_queue() -> None:
    """Take away the name of a queue in shared memory, which all ranks have open: a rank that ends
    would leave it behind.
    """
    from vllm.distributed.parallel_state import get_tp_group

    queue = get_tp_group().mq_broadcaster
    if queue and queue.buffer and queue.buffer.is_creator:
        queue.buffer.shared_memory.unlink()
        queue.buffer.is_creator = False


@contextmanager
def _loader(load: Callable[[Any], None]) -> Iterator[None]:
    """A context in which vLLM's load format `LOAD_FORMAT` calls `load` with the model."""
    from vllm.model_executor import model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class Loader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            pass

        def load_weights(self, model: Any, model_config: Any) -> None:
            load(model)

    model_loader.register_model_loader(LOAD_FORMAT)(Loader)
    try:
        yield
    finally:
        del model_loader._LOAD_FORMAT_TO_MODEL_LOADER[LOAD_FORMAT]  # it would keep the weights


def _kinds(found: dict[str, tuple[str, ParameterShard]]) -> dict[str, list[ParameterShard]]:
    """The shards in one of vLLM's parameters of each kind: the kinds differ in more than a layer's
    number.
    """
    by_param = defaultdict(list)
    for owner, shard in found.values():
        by_param[owner].append(shard)
    first: dict[str, str] = {}
    for owner in by_param:
        first.setdefault(LAYER_NUMBER.sub(".", owner), owner)
    return {owner: by_param[owner] for owner in first.values()}


def _randomize(shard: ParameterShard, seed: int) -> None:
    """Values such as a model has before training, about 1 in vectors."""
    shard.values.fill_(float(len(shard.shape) == 1))
    add_noise(shard.values, shard.name, shard.regions, [seed], [0.02])
