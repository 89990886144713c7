"""A tiny AKI learns, from a list of chats, what colour a picture has: seconds on two cores, all offline."""

from tempfile import mkdtemp

from PIL import Image
from transformers import SiglipImageProcessorPil, TrainingArguments, set_seed

import aki
from aki.data.tokenizer import train_tokenizer
from aki.training.trainer import AkiTrainer

# 1. Chats: dicts of messages. A picture is a PIL image, a path, a URL, an array or the bytes of a file, and may stand
#    beside the messages too: {"messages": [..., {"type": "image"}, ...], "images": [picture]}.
COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 60, 200), "yellow": (220, 200, 50)}


def question(name: str) -> dict:
    picture = Image.new("RGB", (32, 32), COLOURS[name])
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what colour is it?"}]
    return {"role": "user", "content": content}


chats = [{"messages": [question(name), {"role": "assistant", "content": name}]} for name in COLOURS] * 200

# 2. A model and its processor. For trained parts take aki.AkiForConditionalGeneration.from_backbones(...).
set_seed(0)
tokenizer = train_tokenizer(["what colour is it?", *COLOURS], vocab_size=300)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
text = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
config = aki.AkiConfig(
    vision_config={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, **sizes},
    text_config={"model_type": "llama", **text, **sizes},
    connector_config={"connector": "mlp"},
    image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    attention_rule="mma",
)
model = aki.AkiForConditionalGeneration(config)
pictures = SiglipImageProcessorPil(size={"height": 16, "width": 16})
processor = aki.AkiProcessor(pictures, tokenizer, config.image_seq_length, chat_template=aki.templates.SHORT)

# 3. The collator makes batches of chats, with labels on the answers; the trainer is transformers' with the leak guard.
folder = mkdtemp()
arguments = TrainingArguments(
    folder, max_steps=120, per_device_train_batch_size=16, learning_rate=3e-3, report_to="none", logging_steps=20
)
collator = aki.ChatCollator(processor, max_length=64)
AkiTrainer(model, arguments, train_dataset=chats, data_collator=collator).train()

# 4. Saved, opened by transformers, asked.
model.save_pretrained(folder)
processor.save_pretrained(folder)
model = aki.AkiForConditionalGeneration.from_pretrained(folder)
for name in COLOURS:
    inputs = processor.apply_chat_template(
        [question(name)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    said = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    print(name, "->", processor.decode(said, skip_special_tokens=True).strip())
print("the model:", folder)
