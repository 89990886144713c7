"""Videos and audio in vLLM see their question."""

import numpy as np
from asking import NEW_TOKENS, PICTURES, Answer, Reference, engine, same
from folders import aki_folder

RNG = np.random.default_rng(0)
VIDEOS = [RNG.integers(0, 255, (frames, 32, 32, 3), dtype=np.uint8) for frames in (4, 4)]
TONES = [np.sin(np.arange(800) * pitch).astype(np.float32) for pitch in (0.3, 0.5)]


def check(folder, prompts: list[dict], inputs: list[dict], reference: Reference) -> None:
    """vLLM's answers, all at once, are transformers' under mma, none of them what causal attention gives."""
    from vllm import SamplingParams

    expected, causal = ([answer(reference, one, rule) for one in inputs] for rule in ("mma", None))
    with engine(folder, "mma", limit_mm_per_prompt={"image": 1, "video": 1, "audio": 1}) as llm:
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=1)
        results = llm.generate(prompts, sampling, use_tqdm=False)
    for result, right, wrong in zip(results, expected, causal, strict=True):
        one = result.outputs[0]
        logprobs = [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)]
        found = Answer(list(result.prompt_token_ids), list(one.token_ids), logprobs)
        assert same(found, right)
        assert not same(found, wrong)


def answer(reference: Reference, inputs: dict, rule: str | None) -> Answer:
    reference.lay(rule)
    return reference.generated(inputs, NEW_TOKENS)


def test_aki_s_videos_and_audio(tmp_path):
    folder = aki_folder(tmp_path / "model", omni=True)
    reference = Reference(folder)
    asked = [({"audio": TONES[0]}, "what is this?"), ({"video": VIDEOS[0]}, "describe it")]
    asked += [({"audio": TONES[1], "image": PICTURES[0], "video": VIDEOS[1]}, "how many digits are red?")]
    prompts, inputs = [], []
    for media, text in asked:
        parts = [{"type": kind, kind: value} for kind, value in media.items()]
        chat = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
        prompt = reference.processor.apply_chat_template(chat, add_generation_prompt=True)
        if "audio" in media:
            media = media | {"audio": (media["audio"], 8000)}
        prompts.append({"prompt": prompt, "multi_modal_data": media})
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs.append(reference.processor.apply_chat_template(chat, **options))
    check(folder, prompts, inputs, reference)
