"""Compares exported directories in transformers with the program that wrote them; scripts/check-export says how it is called."""

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval, Blip2Processor, Blip2QFormerConfig, Blip2QFormerModel,
)

MAX_NEW_TOKENS = 12
BLIP2_VIT = "blip_2_vision_model"
CLASSES = {"Blip2ForConditionalGeneration": Blip2ForConditionalGeneration, "Blip2ForImageTextRetrieval": Blip2ForImageTextRetrieval}


class Mismatch(Exception):
    """One line that says what differs."""


def require(holds, message):
    if not holds:
        raise Mismatch(message)


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def run_blip2(*arguments):
    done = subprocess.run([os.environ["BLIP2"], *map(str, arguments)], capture_output=True, text=True)
    require(done.returncode == 0, f"blip2 {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


def read_weights(folder):
    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    return {name: tensor.float() for file in sorted(files) for name, tensor in load_file(folder / file).items()}


# Loading

def load_whole(folder, config):
    """The class that config.json names, with every key found and none unknown."""
    cls = CLASSES[config["architectures"][0]]
    # Its default attention leaves out Gemma 2's caps and GPT-2's scales.
    eager = config.get("text_config", {}).get("model_type") in ("gemma2", "gpt2")
    kernel = {"attn_implementation": "eager"} if eager else {}
    model, info = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **kernel)
    wrong = {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs") if info[kind]}
    require(not wrong, f"{cls.__name__} does not load completely: {wrong}")
    return model.eval(), f"{cls.__name__}, {len(model.state_dict())} tensors, none missing, none unexpected"


class Parts(torch.nn.Module):
    """BLIP-2 behind another image encoder, from transformers' own modules; it has no class for that."""

    def __init__(self, folder, config):
        super().__init__()
        weights, vision, qformer = read_weights(folder), config["vision_config"], config["qformer_config"]
        self.vision_model = AutoModel.from_config(AutoConfig.for_model(**vision))
        # CLIP's and SigLIP's classes keep the tower one level down.
        self.tower = getattr(self.vision_model, "vision_model", self.vision_model)
        tower = self.tower.config
        width, depth = tower.hidden_size, tower.num_hidden_layers
        require(config["vision_feature_layer"] == depth, f"vision_feature_layer: expected the last of {depth} blocks, got "
                f"{config['vision_feature_layer']}")
        self.post_layernorm = torch.nn.LayerNorm(width, eps=getattr(tower, "layer_norm_eps", None) or tower.rms_norm_eps)
        self.query_tokens = torch.nn.Parameter(weights.pop("query_tokens"))
        own = {key: value for key, value in qformer.items() if key != "model_type"}
        self.qformer = Blip2QFormerModel(Blip2QFormerConfig(**{**own, "encoder_hidden_size": width}))
        self.post_layernorm.load_state_dict(taken(weights, "vision_model.post_layernorm."))
        self.filled("vision_model", taken(weights, "vision_model."), self.tower, unread_by_blip2)
        self.filled("qformer", taken(weights, "qformer."), self.qformer, lambda name: False)
        self.language_model = None
        if "text_config" in config:
            text = AutoConfig.for_model(**config["text_config"])
            self.language_model = (AutoModelForSeq2SeqLM if text.is_encoder_decoder else AutoModelForCausalLM).from_config(text)
            tied = text.tie_word_embeddings
            unread = lambda name: tied and name in ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
            shared = lambda name: name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
            self.filled("language_model", taken(weights, "language_model."), self.language_model, lambda n: unread(n) or shared(n))
            self.language_model.tie_weights()
            self.language_projection = torch.nn.Linear(qformer["hidden_size"], text.hidden_size)
            self.language_projection.load_state_dict(taken(weights, "language_projection."))
        heads = ("vision_projection.", "text_projection.", "itm_head.", "embeddings.")
        left = [name for name in weights if not name.startswith(heads)]
        require(not left, f"tensors that no part of transformers has: {left}")
        # Whatever dtype a part's configuration names: ids are compared in fp32.
        self.float().eval()

    def filled(self, part, weights, module, may_lack):
        missing, unexpected = module.load_state_dict(weights, strict=False)
        missing = [name for name in missing if not may_lack(name)]
        require(not missing and not unexpected, f"{part}: missing {missing}, unexpected {unexpected}")

    def features(self, pixels):
        """What the last block gives: some classes put their normed output last into hidden_states."""
        encoder = getattr(self.tower, "encoder", self.tower)
        block = (getattr(encoder, "layers", None) or encoder.layer)[-1]
        given = []
        handle = block.register_forward_hook(lambda module, arguments, output: given.append(output))
        interpolates = "interpolate_pos_encoding" in inspect.signature(self.tower.forward).parameters
        other_size = pixels.shape[-1] != self.tower.config.image_size
        self.tower(pixels, **({"interpolate_pos_encoding": True} if interpolates and other_size else {}))
        handle.remove()
        return given[-1][0] if isinstance(given[-1], tuple) else given[-1]

    def queries(self, pixels):
        query_tokens = self.query_tokens.expand(len(pixels), -1, -1)
        features = self.post_layernorm(self.features(pixels))
        return self.qformer(query_embeds=query_tokens, encoder_hidden_states=features).last_hidden_state


def taken(weights, prefix):
    """Removes the tensors below a prefix and returns them without it."""
    names = [name for name in weights if name.startswith(prefix)]
    return {name.removeprefix(prefix): weights.pop(name) for name in names}


def unread_by_blip2(name):
    """What a tower has behind or beside the features."""
    parts = ("layernorm.", "norm.", "post_layernorm.", "pooler.", "head.", "rms_norm.")
    return name.startswith(parts) or name.endswith((".mask_token", "position_ids"))


# Text and pixels

def check_processor(folder, config, stage_two, images):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = Blip2Processor.from_pretrained(folder)
    if stage_two and (folder / "processor_config.json").exists():
        require(processor.num_query_tokens == config["num_query_tokens"], f"processor_config.json: num_query_tokens: expected "
                f"{config['num_query_tokens']}, got {processor.num_query_tokens}")
        image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token.content
                                                                if hasattr(processor.image_token, "content") else processor.image_token)
        require(image_token == config["image_token_index"], f"config.json: image_token_index: expected the tokenizer's {image_token}, "
                f"got {config['image_token_index']}")
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    return tokenizer, pixels


def prompt_ids(tokenizer, config, prompt):
    """The ids in front of and behind the queries, as blip2 has them."""
    before = config.get("before_queries")
    bos = config["text_config"].get("bos_token_id")
    if before is not None:
        # OPT was trained with its first token behind the queries, whatever its tokenizer adds.
        first = [2 if bos is None else bos] if config["text_config"]["model_type"] == "opt" else []
        return before, first + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    behind = tokenizer(prompt)["input_ids"]
    return [], behind or ([bos] if bos is not None else [])


# Stage 2

def generated(model, config, tokenizer, pixels, prompt):
    """Greedy ids behind the prompt, cut before the end token."""
    before, behind = prompt_ids(tokenizer, config, prompt)
    decoder = not model.language_model.config.is_encoder_decoder
    options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "num_beams": 1}
    if isinstance(model, Parts):
        embed = lambda ids: model.language_model.get_input_embeddings()(torch.tensor([ids], dtype=torch.long)).expand(len(pixels), -1, -1)
        rows = torch.cat([embed(before), model.language_projection(model.queries(pixels)), embed(behind)], 1)
        mask = torch.ones(rows.shape[:2], dtype=torch.long)
        output, prefix = model.language_model.generate(inputs_embeds=rows, attention_mask=mask, **options), 0
    else:
        token = config["image_token_index"]
        require(token is not None, "config.json: image_token_index: expected an id, got null; transformers cannot place the queries")
        ids = [*before, *[token] * config["num_query_tokens"], *behind]
        inputs = torch.tensor([ids]).repeat(len(pixels), 1)
        output, prefix = model.generate(pixel_values=pixels, input_ids=inputs, **options), len(ids) if decoder else 0
    return [cut(row[prefix:].tolist() if decoder else row[1:].tolist(), model.language_model) for row in output]


def cut(ids, language_model):
    end = language_model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def check_generation(folder, model, config, tokenizer, pixels, files, prompts):
    compared = 0
    for prompt in prompts:
        arguments = ["--model", folder, "--precision", "fp32", "--device", "cpu", "--json", "--max-new-tokens", MAX_NEW_TOKENS]
        lines = run_blip2("generate", *arguments, *(["--prompt", prompt] if prompt else []), "--image", *files)
        ours = [json.loads(line)["ids"] for line in lines.splitlines()]
        theirs = generated(model, config, tokenizer, pixels, prompt)
        for file, got, expected in zip(files, ours, theirs):
            require(got == expected, f"{file}, prompt {prompt!r}: blip2 generates {got}, transformers {expected}")
            compared += 1
    return f"greedy ids of {len(files)} images x {len(prompts)} prompts equal ({compared} texts)"


# Stage 1

def check_scores(folder, model, config, tokenizer, pixels):
    """Similarities of all images with all texts, and the matching logits of each image with its own text."""
    texts = [" ".join(tokenizer.convert_ids_to_tokens([10 + i, 20 + i, 30 + i][: 2 + i % 2])) for i in range(len(pixels))]
    text = tokenizer(texts, padding=True, return_tensors="pt")
    mask = text["attention_mask"]
    others = torch.arange(len(pixels)).roll(1)
    with tempfile.TemporaryDirectory() as home:
        batch, out = Path(home, "batch.safetensors"), Path(home, "out.safetensors")
        save_file({"pixel_values": pixels, "input_ids": text["input_ids"], "attention_mask": mask,
                   "negative_image_index": others, "negative_text_index": others.clone()}, batch)
        run_blip2("replay", "--model", folder, "--task", "stage1", "--batch", batch, "--out", out, "--device", "cpu")
        ours = load_file(out)
    inputs = {"pixel_values": pixels, "input_ids": text["input_ids"], "attention_mask": mask}
    temp = load_file(folder / "pretraining_heads.safetensors")["temp"]
    similarity = model(**inputs, use_image_text_matching_head=False).logits_per_image / temp
    matching = model(**inputs, use_image_text_matching_head=True).logits_per_image
    figures = relative(ours["sim_i2t"], similarity), relative(ours["itm_logits"][: len(pixels)], matching)
    require(max(figures) < 1e-5, f"similarities and matching logits differ by {figures[0]:.1e} and {figures[1]:.1e}")
    return f"similarities within {figures[0]:.1e}, matching logits within {figures[1]:.1e}"


# All of it

def check(folder, files, prompts):
    config = json.loads((folder / "config.json").read_text())
    stage_two = config["architectures"] == ["Blip2ForConditionalGeneration"]
    tower = config["vision_config"].get("model_type", BLIP2_VIT)
    whole = tower == BLIP2_VIT
    if whole:
        model, said = load_whole(folder, config)
    else:
        model, said = Parts(folder, config), f"transformers has no BLIP-2 class with a {tower} tower; its parts have all names and shapes"
    images = [Image.open(file).convert("RGB") for file in files]
    tokenizer, pixels = check_processor(folder, config, stage_two, images)
    with torch.no_grad():
        if stage_two:
            return [said, check_generation(folder, model, config, tokenizer, pixels, files, prompts)]
        if whole:
            return [said, check_scores(folder, model, config, tokenizer, pixels)]
        require(bool(torch.isfinite(model.queries(pixels)).all()), "the queries are not finite")
        return [said, "its queries are finite"]


def pictures(home, folder):
    """Three pictures of noise of the model's own size, so that the resizing, in which one bit is open, does not matter."""
    size = json.loads((folder / "preprocessor_config.json").read_text())["size"]
    random = np.random.default_rng(0)
    paths = [Path(home, f"picture_{i}.png") for i in range(3)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (size["height"], size["width"], 3), dtype=np.uint8)).save(path)
    return paths


def main():
    parser = argparse.ArgumentParser(prog="check-export")
    parser.add_argument("--image", type=Path, action="append", default=[])
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR")
    arguments = parser.parse_args()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))
    failed = 0
    with tempfile.TemporaryDirectory() as home:
        for folder in arguments.directories:
            try:
                files = arguments.image or pictures(home, folder)
                for line in check(folder, files, ["", *arguments.prompt]):
                    print(f"{folder}: {line}")
            except (Mismatch, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
                failed += 1
                print(f"{folder}: FAILED: {type(error).__name__}: {error}", file=sys.stderr)
    print(f"check-export: {len(arguments.directories) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
