"""A tiny LLaVA learns to answer about DigitScenes, causal and unlocked: a minute on two cores, nothing downloaded."""

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPImageProcessorPil, LlavaProcessor, set_seed

import aki
from aki.data.digits import DigitScenes, corpus
from aki.data.tokenizer import train_tokenizer
from aki.models.templates import SHORT

STEPS, BATCH, SKILLS = 300, 64, ("colour",)
tokenizer = train_tokenizer(corpus(grid=3, size=500))
images = CLIPImageProcessorPil(size={"height": 24, "width": 24}, do_center_crop=False)
sizes = {"patch_size": 8, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
processor = aki.write_prompt_blocks(LlavaProcessor(images, tokenizer, chat_template=SHORT, **sizes))
layers = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
config = AutoConfig.for_model(
    "llava",
    text_config={"model_type": "llama", "vocab_size": len(tokenizer), "initializer_range": 0.1, **layers},
    vision_config={"model_type": "siglip_vision_model", "image_size": 24, "patch_size": 8, "vision_use_head": False, **layers},
    vision_feature_select_strategy="full",
    vision_feature_layer=-1,
    initializer_range=0.1,
    image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
)


def batch(split: str, start: int, size: int) -> dict[str, torch.Tensor]:
    chats = [DigitScenes(split, "question", 10**6, 24, skills=SKILLS)[start + i].messages for i in range(size)]
    inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True})
    answers = (inputs["prompt_block_ids"] < 0) & (inputs["attention_mask"] == 1)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~answers, -100)}


def accuracy(model, inputs: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        predicted, labels = model(**inputs).logits[:, :-1].argmax(-1), inputs["labels"][:, 1:]
    return float(((predicted == labels) | (labels == -100)).all(1).float().mean())


train, test = [batch("train", BATCH * i, BATCH) for i in range(64)], batch("test", 0, 500)
for unlocked in (False, True):
    set_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    if unlocked:
        aki.unlock(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        loss = model(**{k: v for k, v in train[step % len(train)].items() if unlocked or k != "prompt_block_ids"}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0: print(step + 1, float(loss), accuracy(model.eval(), {k: v for k, v in test.items() if unlocked or k != "prompt_block_ids"})); model.train()
