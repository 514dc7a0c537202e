"""LAVIS' BLIP-2 models in any size, made of LAVIS' own classes without its downloads.

Needs torch, transformers 4.x, and LAVIS_DIR: the folder of an unpacked wheel or checkout of salesforce-lavis (1.0.2), which holds `lavis/`.
LAVIS pins old versions of many packages; only three of its files matter here, so they are imported alone, and what has moved in
transformers since is put back under its old name first.
"""

import importlib
import os
import sys
import types

import torch
from torch import nn

classes = types.SimpleNamespace()


def load():
    """Imports LAVIS' Q-Former and ViT."""
    root = os.environ.get("LAVIS_DIR")
    if not root or not os.path.isdir(os.path.join(root, "lavis", "models")):
        sys.exit("LAVIS_DIR: expected the folder that holds lavis/models, of an unpacked salesforce-lavis 1.0.2")
    import transformers.modeling_utils as present
    import transformers.pytorch_utils as moved

    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        if not hasattr(present, name):
            setattr(present, name, getattr(moved, name))

    def stand_in(name, **members):
        module = types.ModuleType(name)
        module.__dict__.update(members)
        sys.modules[name] = module
        return module

    # Packages whose __init__ would import all of LAVIS.
    for name in ("lavis", "lavis.models", "lavis.models.blip2_models", "lavis.common"):
        stand_in(name, __path__=[os.path.join(root, *name.split("."))])
    stand_in("lavis.common.dist_utils", download_cached_file=None)
    identity = lambda x, *_: x  # noqa: E731
    stand_in("timm"), stand_in("timm.models")
    stand_in("timm.models.layers", drop_path=identity, to_2tuple=lambda x: (x, x), trunc_normal_=nn.init.trunc_normal_)
    stand_in("timm.models.registry", register_model=identity)
    classes.BertLMHeadModel = importlib.import_module("lavis.models.blip2_models.Qformer").BertLMHeadModel
    classes.VisionTransformer = importlib.import_module("lavis.models.eva_vit").VisionTransformer


def _bridge(image_width, queries, vocabulary, bert):
    """What both stages have: Q-Former, queries, ln_vision. Without vocabulary, the text half goes as in LAVIS' Blip2OPT and Blip2T5."""
    from transformers import BertConfig

    config = BertConfig(vocab_size=vocabulary or 30523, **bert)
    config.encoder_width, config.add_cross_attention = image_width, True
    config.cross_attention_freq, config.query_length = 2, queries
    model = nn.Module()
    model.ln_vision = nn.LayerNorm(image_width)
    model.Qformer = classes.BertLMHeadModel(config)
    model.query_tokens = nn.Parameter(torch.randn(1, queries, config.hidden_size))
    if vocabulary is None:
        model.Qformer.cls = None
        model.Qformer.bert.embeddings.word_embeddings = None
        model.Qformer.bert.embeddings.position_embeddings = None
        for layer in model.Qformer.bert.encoder.layer:
            layer.output = None
            layer.intermediate = None
    return model


def stage1(image_width, vocabulary, queries=32, embedding=256, **bert):
    """Blip2Qformer without its image encoder."""
    model = _bridge(image_width, queries, vocabulary, bert)
    width = model.query_tokens.shape[2]
    model.vision_proj = nn.Linear(width, embedding)
    model.text_proj = nn.Linear(width, embedding)
    model.itm_head = nn.Linear(width, 2)
    model.temp = nn.Parameter(torch.tensor(0.07))
    return model


def stage2(projection, language_width, image_width, queries=32, **bert):
    """Blip2OPT (projection opt_proj), Blip2T5 (t5_proj) or the Vicuna one (llm_proj) without its frozen towers."""
    model = _bridge(image_width, queries, None, bert)
    setattr(model, projection, nn.Linear(model.query_tokens.shape[2], language_width))
    return model


def vit(image_size, patch_size, width, depth, heads):
    """LAVIS' EVA-CLIP ViT."""
    norm = lambda size: nn.LayerNorm(size, eps=1e-6)  # noqa: E731
    model = classes.VisionTransformer(img_size=image_size, patch_size=patch_size, embed_dim=width, depth=depth, num_heads=heads,
                                      mlp_ratio=1.5, qkv_bias=True, use_mean_pooling=False, norm_layer=norm)
    return model.eval()


def randomise(model):
    """Values for every parameter: what starts as zeros or ones would hide a mistake."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)


def checkpoint(model, epoch):
    """As LAVIS' runner saves: what is trained, and the state of the run."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    config = {"run": {"max_epoch": 10}, "model": {"arch": "blip2"}}
    return {"model": state, "optimizer": optimizer.state_dict(), "config": config, "scaler": None, "epoch": epoch}
