"""Generation by vLLM: requests that share steps, token ids in and out."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from shardes.clock import Clock
from shardes.config.schema import Config
from shardes.distributed.store import no_poll
from shardes.engines.vllm import VLLMEngine
from shardes.errors import ConfigError, described
from shardes.inference import rope
from shardes.inference.engine_generation import Generation
from shardes.inference.generation import Decoder, ignore_members, ignore_response

PROBE = [1, 2, 3, 4, 5, 6]  # token ids with which `check_writes` asks


def check_rotary(config: Config, module: PreTrainedModel) -> None:
    """Raise ConfigError if vLLM would rotate a request by other frequencies than transformers.

    Where these change with the length, vLLM takes those of its longest request for all.
    """
    scaling = rope.length_scaling(module)
    if scaling is None:
        return
    if scaling.dynamic:
        raise ConfigError(
            f"model.path={config.model.path}: its rotary frequencies change with every length, and "
            "vLLM's do not; use another engine"
        )
    limit = min(scaling.boundaries)
    if (config.vllm.max_model_len or limit + 1) > limit:
        raise ConfigError(
            f"vllm.max_model_len: the rotary frequencies of {config.model.path} change at {limit} "
            f"tokens, and vLLM takes the later ones for all; set vllm.max_model_len={limit}, or "
            "use another engine"
        )


class VLLMGeneration(Generation):
    """Answers prompts with vLLM's scheduler. Responses end as the decoder's do.

    Sampled responses are functions of model, prompt and seed, but others than the decoder's.

    Args:
        decoder: says how responses end.
        clock: its part "generate" is timed.
    """

    def __init__(self, engine: VLLMEngine, decoder: Decoder, clock: Clock | None = None):
        self._engine, self._llm, self._decoder = engine, engine.llm, decoder
        self._clock = clock or Clock()
        self.max_new_tokens = decoder.max_new_tokens

    def check_writes(self) -> None:
        """See `VLLMEngine.check_writes`."""
        try:
            self._engine.check_writes(lambda: self.log_probs([PROBE[:2]], [PROBE[2:]])[0])
        except ConfigError:
            raise
        except Exception as error:  # whatever vLLM's kernels say of the model's sizes
            raise ConfigError(
                f"engine=vllm: vLLM cannot run this model here: {described(error)}"
            ) from error

    def responses(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int] | None = None,
        *,
        poll: Callable[[], None] = no_poll,
        members: Sequence[int] | None = None,
        set_members: Callable[[Sequence[int]], Hashable] = ignore_members,
        ended: Callable[[int, list[int]], None] = ignore_response,
    ) -> list[list[int]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._check_lengths(prompts)
        responses: list[list[int]] = [[] for _ in prompts]
        with self._requests() as add:
            for number, prompt in enumerate(prompts):
                sampling = (
                    dict(temperature=0.0)
                    if seeds is None
                    else dict(temperature=1.0, seed=seeds[number] % 2**63)
                )
                add(
                    number,
                    prompt,
                    SamplingParams(
                        **sampling,
                        max_tokens=self.max_new_tokens,
                        stop_token_ids=sorted(self._decoder.eos),
                        ignore_eos=True,  # all of them are among stop_token_ids
                        logprobs=0,  # NaN where logits are NaN or infinite
                        detokenize=False,
                        output_kind=RequestOutputKind.DELTA,
                    ),
                    None if members is None else self._engine.requests[members[number]],
                )
            going = set(range(len(prompts)))
            while going:
                poll()
                for number in self._step(responses, going):
                    going.remove(number)
                    ended(number, responses[number])
        return responses

    def _step(self, responses: list[list[int]], going: set[int]) -> list[int]:
        """Make one step; returns the prompts whose responses end with it."""
        finished, cut = [], []
        for output in self._llm.step():
            number, part = int(output.request_id), output.outputs[0]
            if number not in going:
                continue
            responses[number] += part.token_ids
            if _is_invalid(part):
                responses[number].clear()
                cut.append(number)
            elif output.finished:
                finished.append(number)
            elif self._decoder.has_stop_string(responses[number]):
                cut.append(number)
        if cut:
            self._llm.abort_request(list(map(str, cut)))
        return finished + cut

    def log_probs(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        poll: Callable[[], None] = no_poll,
    ) -> list[list[float]]:
        from vllm import SamplingParams

        self._check_lengths(prompts)
        values: list[list[float]] = [[] for _ in prompts]
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, temperature=0.0)
        with self._requests() as add:
            for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
                add(number, [*prompt, *response], params)
            while self._llm.has_unfinished_requests():
                poll()
                for output in self._llm.step():
                    number = int(output.request_id)
                    response, first = responses[number], len(prompts[number])
                    values[number] = [
                        output.prompt_logprobs[first + i][token].logprob
                        for i, token in enumerate(response)
                    ]
        return values

    def following(self, adapters: Sequence[Any]) -> list[list[float]]:
        """The log-probabilities of some tokens after a fixed prompt, with each of these adapters in
        one batch; None: without.
        """
        from vllm import SamplingParams

        values: list[list[float]] = [[] for _ in adapters]
        params = SamplingParams(
            max_tokens=1, logprob_token_ids=PROBE, detokenize=False, temperature=0.0
        )
        with self._requests() as add:
            for number, adapter in enumerate(adapters):
                add(number, PROBE, params, adapter)
            while self._llm.has_unfinished_requests():
                for output in self._llm.step():
                    found = output.outputs[0].logprobs[0]
                    values[int(output.request_id)] = [found[token].logprob for token in PROBE]
        return values

    def is_complete(self, response: Sequence[int]) -> bool:
        return self._decoder.is_complete(response)

    @contextmanager
    def _requests(self) -> Iterator[Callable[..., None]]:
        """A context for requests, of which none is left on exit; yields what adds one."""
        self._engine.take_weights()
        added: list[str] = []

        def add(number: int, prompt: Sequence[int], params: Any, adapter: Any = None) -> None:
            added.append(str(number))
            self._llm.add_request(
                str(number), {"prompt_token_ids": list(prompt)}, params, lora_request=adapter
            )

        try:
            with self._clock("generate"):
                yield add
        finally:
            self._llm.abort_request(added)
            while self._llm.has_unfinished_requests():
                self._llm.step()

    def _check_lengths(self, prompts: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, prompts), default=0) + self.max_new_tokens
        if longest >= self._engine.context:
            raise ConfigError(
                f"generation.max_new_tokens={self.max_new_tokens}: the longest prompt and its "
                f"response have {longest} tokens, and engine=vllm takes fewer than "
                f"{self._engine.context} (vllm.max_model_len, or the model's context)"
            )


def _is_invalid(part: Any) -> bool:
    return any(
        not math.isfinite(value.logprob) for token in part.logprobs for value in token.values()
    )
