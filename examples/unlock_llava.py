"""A tiny LLaVA learns to answer about DigitScenes, causal and unlocked: under a minute on two cores, all offline."""

from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPImageProcessorPil, LlavaProcessor, set_seed

import aki
from aki.data.collate import ChatCollator
from aki.data.digits import DigitScenes, corpus
from aki.data.tokenizer import train_tokenizer
from aki.models.templates import SHORT
from aki.training.scoring import accuracy_by_skill

images = CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
tokenizer = train_tokenizer(corpus(grid=2, size=300))
processor = LlavaProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="full", chat_template=SHORT)
collate = ChatCollator(aki.write_prompt_blocks(processor), max_length=64)
scenes = {"task": "question", "image_size": 16, "grid": 2, "skills": ("colour", "count_colour")}
batches = list(DataLoader(DigitScenes("train", size=3840, **scenes), batch_size=64, collate_fn=collate))
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
vision = AutoConfig.for_model("siglip_vision_model", image_size=16, patch_size=8, vision_use_head=False, **sizes)
text = AutoConfig.for_model("llama", vocab_size=len(tokenizer), initializer_range=0.1, **sizes)
parts = {"vision_config": vision, "text_config": text, "image_token_index": processor.image_token_id}
features = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "initializer_range": 0.1}
config = AutoConfig.for_model("llava", **parts, **features)
for rule in ("causal", "mma"):
    set_seed(0)
    model = aki.unlock(AutoModelForImageTextToText.from_config(config), rule=rule)
    optimizer = AdamW(model.parameters(), lr=2e-3)
    for batch in batches * 6:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    accuracy = accuracy_by_skill(model, collate, DigitScenes("test", size=600, **scenes))
    print(rule, {skill: round(share, 2) for skill, share in accuracy.items()})
