"""Writes a small Llama with random weights through `transformers`: a checkpoint to try the programs
on.

  python scripts/make_small_llama.py --tokenizer=FOLDER_OR_HUB_ID --out=models/small-llama

Needs torch (the test extra has it).
"""

from absl import app, flags

TOKENIZER = flags.DEFINE_string(
    "tokenizer", "meta-llama/Llama-2-7b-hf", "tokenizer folder or Hub id"
)
OUT = flags.DEFINE_string("out", "models/small-llama", "folder to write")
WIDTH = flags.DEFINE_integer("width", 40, "model width; must be a multiple of 8")
LAYERS = flags.DEFINE_integer("layers", 2, "decoder layers")


def main(_) -> None:
    """Writes config.json, safetensors and the tokenizer's files."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER.value)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH.value,
            intermediate_size=3 * WIDTH.value,
            num_hidden_layers=LAYERS.value,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(OUT.value)
    tokenizer.save_pretrained(OUT.value)
    print(f"{OUT.value}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    app.run(main)
