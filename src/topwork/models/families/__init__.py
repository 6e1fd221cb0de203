"""One file per model_type: `spec(read) -> DecoderSpec` and `CASES`, the options it acts on."""

NAMES = ("llama", "mistral", "qwen2", "qwen3")
