"""A tiny LLaVA learns to answer about DigitScenes, causal and unlocked: under a minute on two cores, all offline."""

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPImageProcessorPil, LlavaProcessor, set_seed

import aki
from aki.data.digits import DigitScenes, corpus
from aki.data.tokenizer import train_tokenizer
from aki.models.templates import SHORT

tokenizer = train_tokenizer(corpus(grid=2, size=300))
images = CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
processor = aki.write_prompt_blocks(
    LlavaProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="full", chat_template=SHORT)
)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
vision = {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, "vision_use_head": False}
config = AutoConfig.for_model(
    "llava",
    text_config={"model_type": "llama", "vocab_size": len(tokenizer), "initializer_range": 0.1, **sizes},
    vision_config={**vision, **sizes},
    image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    vision_feature_layer=-1,
    vision_feature_select_strategy="full",
    initializer_range=0.1,
)


def batch(split: str, start: int, size: int) -> dict[str, torch.Tensor]:
    scenes = DigitScenes(split, "question", start + size, image_size=16, grid=2, skills=("colour", "count_colour"))
    chats = [scenes[i].messages for i in range(start, start + size)]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": {"padding": True}}
    inputs = processor.apply_chat_template(chats, **options)
    answers = (inputs.pop("prompt_block_ids") < 0) & (inputs["attention_mask"] == 1)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~answers, -100)}


train, test = [batch("train", 64 * i, 64) for i in range(60)], batch("test", 0, 600)
for name in ("causal", "unlocked"):
    set_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    if name == "unlocked":
        aki.unlock(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(360):
        model(**train[step % len(train)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        predicted, labels = model.eval()(**test).logits[:, :-1].argmax(-1), test["labels"][:, 1:]
    right = ((predicted == labels) | (labels == -100)).all(1)
    print(f"{name}: {right.float().mean():.2f} of {len(right)} answers right")
