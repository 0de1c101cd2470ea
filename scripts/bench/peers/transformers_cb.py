"""transformers' own continuous batching on the CPU: the same weights in fp32, 16 sequences a step.

Owns: its settings. Source: huggingface.co/docs/transformers, "Continuous batching". `sdpa` attention: flash
attention needs a GPU, and `paged|eager` is the same or slower here. Prefix sharing off: the prompts share
none. 16 sequences a step and a page of KV memory for each token that they can need.
"""

from collections.abc import Callable, Sequence

from scripts.bench.chat import SLOTS, Job, mix, total_tokens

PAGE = 64
STEP_TOKENS = 256
"""Prompts and running sequences together, as ours."""


def passes(count: int, seed: int, longest: int) -> Callable[[], int]:
    """Loads the model; each call generates the whole mix and returns the number of output tokens."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    from deployments.models.smollm2 import shipped

    transformers.logging.set_verbosity_error()
    jobs = mix(count, seed, longest)
    model = AutoModelForCausalLM.from_pretrained(
        shipped(), dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    units = max(len(job.prompt) + job.max_tokens for job in jobs)
    settings = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=(SLOTS + 1) * -(-units // PAGE),
        max_batch_tokens=STEP_TOKENS,
        max_requests_per_batch=SLOTS,
        allow_block_sharing=False,
        auto_switch_to_flash=False,
    )
    # -1: no token ends a text, as with ignore_eos.
    greedy = GenerationConfig(do_sample=False, max_new_tokens=longest, eos_token_id=-1, pad_token_id=2)

    def run() -> int:
        with model.continuous_batching_context_manager(
            generation_config=greedy, continuous_batching_config=settings, timeout=5, persistent_manager=True
        ) as manager:
            _generate(manager, jobs)
        return total_tokens(jobs)

    return run


def _generate(manager: "object", jobs: Sequence[Job]) -> None:
    """RuntimeError where a sequence fails or is short."""
    add, result = manager.add_request, manager.get_result  # type: ignore[attr-defined]
    wanted = {
        add(list(job.prompt), max_new_tokens=job.max_tokens, eos_token_id=-1): job.max_tokens for job in jobs
    }
    while wanted:
        output = result(timeout=1)
        if output is None and not manager.is_running():  # type: ignore[attr-defined]
            raise RuntimeError("transformers' generation thread ended")
        if output is None or not output.is_finished():
            continue
        if output.error or len(output.generated_tokens) != wanted.pop(output.request_id):
            raise RuntimeError(f"transformers: {output.error or 'a text is short'}")
