"""Generation with vLLM, started by benchmarks/generation.py in vLLM's own environment.

Reads a request as JSON from standard input. Writes the tokens per second of each repeat to standard
output.
"""

import json
import sys
import time

from vllm import LLM, SamplingParams


def main() -> None:
    request = json.load(sys.stdin)
    llm = LLM(
        model=request["model"],
        dtype=request["dtype"],
        max_model_len=1024,
        max_num_seqs=len(request["prompts"]),
    )
    sampling = SamplingParams(temperature=0, max_tokens=request["longest"], ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    rates = []
    for repeat in range(request["repeats"] + 1):
        start = time.perf_counter()
        answers = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        if repeat:  # the first one warms up
            rates.append(sum(len(answer.outputs[0].token_ids) for answer in answers) / seconds)
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
