"""Our backbones with the random weights of tiny `transformers` models give the same outputs."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssljax.models import ResNet, TextTransformer, ViT

torch = pytest.importorskip("torch", reason="parity needs PyTorch: pip install ssljax[parity]")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers: pip install ssljax[parity]")

HEADS, WIDTH, DEPTH, MLP, SIDE, PATCH = 2, 16, 2, 24, 16, 4
SHARED = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": MLP,
    "image_size": SIDE,
    "patch_size": PATCH,
}
OURS = {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "mlp_dim": MLP, "image_size": SIDE, "patch": PATCH}
IMAGES = np.random.default_rng(0).normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)


def randomized(model):
    """In evaluation mode, every parameter and statistic drawn anew: fresh ones hide errors behind zeros and ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dtype.is_floating_point:
                tensor.normal_(0.0, 0.3, generator=generator)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
    return model.eval()


def weights(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def dense(w, name):
    return {"kernel": w[f"{name}.weight"].T, **({"bias": w[f"{name}.bias"]} if f"{name}.bias" in w else {})}


def norm(w, name):
    return {"scale": w[f"{name}.weight"], "bias": w[f"{name}.bias"]}


def attention(projections):
    """Of query, key, value and out as dense layers."""
    split = {
        name: {"kernel": p["kernel"].reshape(WIDTH, HEADS, -1), "bias": p["bias"].reshape(HEADS, -1)}
        for name, p in projections.items()
        if name != "out"
    }
    out = projections["out"]
    return {**split, "out": {"kernel": out["kernel"].reshape(HEADS, -1, WIDTH), "bias": out["bias"]}}


def block(w, prefix, names):
    """`names`: theirs of norm1, norm2, query, key, value, out, fc1 and fc2."""
    projections = {ours: dense(w, f"{prefix}.{names[ours]}") for ours in ("query", "key", "value", "out")}
    return {
        "norm1": norm(w, f"{prefix}.{names['norm1']}"),
        "norm2": norm(w, f"{prefix}.{names['norm2']}"),
        "attn": attention(projections),
        "mlp": {ours: dense(w, f"{prefix}.{names[ours]}") for ours in ("fc1", "fc2")},
    }


def patch_embed(w, name):
    kernel = w[f"{name}.weight"].transpose(2, 3, 1, 0).reshape(-1, WIDTH)
    return {"kernel": kernel, **({"bias": w[f"{name}.bias"]} if f"{name}.bias" in w else {})}


CLIP_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
DINO_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "out": "attention.o_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


def check_parameters(module, params, *inputs):
    """The mapping fills our tree: nothing missing, nothing over."""
    expected = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, expected["params"])


def theirs(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


def to_torch(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def close(ours, their_tensor):
    np.testing.assert_allclose(ours, their_tensor.numpy(), rtol=1e-4, atol=1e-4)


def test_clip_towers():
    text_config = {
        "vocab_size": 30,
        "max_position_embeddings": 8,
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "intermediate_size": MLP,
        "eos_token_id": 29,
        "bos_token_id": 28,
        "pad_token_id": 0,
    }
    config = transformers.CLIPConfig(text_config=text_config, vision_config=SHARED, projection_dim=6)
    model = randomized(transformers.CLIPModel(config))
    w = weights(model)
    vision = ViT(**OURS, projection=6, pre_norm=True, activation="quick_gelu", norm_eps=1e-5)
    prefix = "vision_model"
    table = w[f"{prefix}.embeddings.position_embedding.weight"]
    params = {
        "patch_embed": patch_embed(w, f"{prefix}.embeddings.patch_embedding"),
        "class_token": w[f"{prefix}.embeddings.class_embedding"][None],
        "positions": table,
        "pre_norm": norm(w, f"{prefix}.pre_layrnorm"),
        "transformer": {f"block_{i}": block(w, f"{prefix}.encoder.layers.{i}", CLIP_NAMES) for i in range(DEPTH)},
        "norm": norm(w, f"{prefix}.post_layernorm"),
        "projection": dense(w, "visual_projection"),
    }
    check_parameters(vision, params, IMAGES)
    tokens = np.array([[28, 3, 7, 29, 0, 0], [28, 5, 9, 11, 4, 29]])
    outputs = theirs(model, input_ids=torch.from_numpy(tokens), pixel_values=to_torch(IMAGES))
    features = jax.jit(vision.apply)({"params": params}, IMAGES)["features"]
    close(features / np.linalg.norm(features, axis=-1, keepdims=True), outputs.image_embeds)
    close(features, outputs.vision_model_output.pooler_output)

    text = TextTransformer(vocab_size=30, context_length=8, width=WIDTH, depth=DEPTH, heads=HEADS, mlp_dim=MLP,
                           pool="eos", eos_id=29, projection=6)  # fmt: skip
    prefix = "text_model"
    params = {
        "token_embed": {"embedding": w[f"{prefix}.embeddings.token_embedding.weight"]},
        "positions": w[f"{prefix}.embeddings.position_embedding.weight"],
        "transformer": {f"block_{i}": block(w, f"{prefix}.encoder.layers.{i}", CLIP_NAMES) for i in range(DEPTH)},
        "norm": norm(w, f"{prefix}.final_layer_norm"),
        "projection": dense(w, "text_projection"),
    }
    check_parameters(text, params, tokens)
    ours = jax.jit(text.apply)({"params": params}, tokens)
    close(ours["tokens"], outputs.text_model_output.last_hidden_state)
    close(ours["features"] / np.linalg.norm(ours["features"], axis=-1, keepdims=True), outputs.text_embeds)


@pytest.mark.parametrize("registers", [0, 3])
def test_dinov2(registers):
    family = "Dinov2WithRegisters" if registers else "Dinov2"
    extra = {"num_register_tokens": registers} if registers else {}
    shared = {k: v for k, v in SHARED.items() if k != "intermediate_size"}
    config = getattr(transformers, f"{family}Config")(**shared, mlp_ratio=2, **extra)
    model = randomized(getattr(transformers, f"{family}Model")(config))
    w = weights(model)
    vit = ViT(**{**OURS, "mlp_dim": 2 * WIDTH}, layer_scale=1.0, registers=registers)
    blocks = {
        f"block_{i}": {
            **block(w, f"encoder.layer.{i}", DINO_NAMES),
            "layer_scale1": w[f"encoder.layer.{i}.layer_scale1.lambda1"],
            "layer_scale2": w[f"encoder.layer.{i}.layer_scale2.lambda1"],
        }
        for i in range(DEPTH)
    }
    params = {
        "patch_embed": patch_embed(w, "embeddings.patch_embeddings.projection"),
        "class_token": w["embeddings.cls_token"][0],
        "positions": w["embeddings.position_embeddings"][0],
        "transformer": blocks,
        "norm": norm(w, "layernorm"),
        **({"registers": w["embeddings.register_tokens"][0]} if registers else {}),
    }
    check_parameters(vit, params, IMAGES)
    outputs = theirs(model, to_torch(IMAGES))
    ours = jax.jit(vit.apply)({"params": params}, IMAGES)
    close(ours["features"], outputs.pooler_output)
    close(ours["patches"].reshape(2, 16, WIDTH), outputs.last_hidden_state[:, 1 + registers :])


def test_siglip_vision():
    config = transformers.SiglipVisionConfig(**SHARED)
    model = randomized(transformers.SiglipVisionModel(config))
    w = {name.removeprefix("vision_model."): value for name, value in weights(model).items()}
    vit = ViT(**OURS, pool="map", class_token=False, activation="gelu_tanh")
    qkv = {
        name: {"kernel": kernel.T, "bias": bias}
        for name, kernel, bias in zip(
            ("query", "key", "value"),
            np.split(w["head.attention.in_proj_weight"], 3),
            np.split(w["head.attention.in_proj_bias"], 3),
            strict=True,
        )
    }
    params = {
        "patch_embed": patch_embed(w, "embeddings.patch_embedding"),
        "positions": w["embeddings.position_embedding.weight"],
        "transformer": {f"block_{i}": block(w, f"encoder.layers.{i}", CLIP_NAMES) for i in range(DEPTH)},
        "norm": norm(w, "post_layernorm"),
        "attention_pool": {
            "probe": w["head.probe"],
            "attn": attention({**qkv, "out": dense(w, "head.attention.out_proj")}),
            "norm": norm(w, "head.layernorm"),
            "mlp": {name: dense(w, f"head.mlp.{name}") for name in ("fc1", "fc2")},
        },
    }
    check_parameters(vit, params, IMAGES)
    outputs = theirs(model, to_torch(IMAGES))
    ours = jax.jit(vit.apply)({"params": params}, IMAGES)
    close(ours["patches"].reshape(2, 16, WIDTH), outputs.last_hidden_state)
    close(ours["features"], outputs.pooler_output)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_resnet(kind):
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16] if kind == "basic" else [32, 64], depths=[1, 2], layer_type=kind
    )
    model = randomized(transformers.ResNetModel(config))
    w = weights(model)
    params, stats = {}, {}

    def convert(theirs, conv_name, norm_name, prefix=None):
        tree, running = (
            (params, stats) if prefix is None else (params.setdefault(prefix, {}), stats.setdefault(prefix, {}))
        )
        tree[conv_name] = {"kernel": w[f"{theirs}.convolution.weight"].transpose(2, 3, 1, 0)}
        tree[norm_name] = norm(w, f"{theirs}.normalization")
        running[norm_name] = {stat: w[f"{theirs}.normalization.running_{stat}"] for stat in ("mean", "var")}

    convert("embedder.embedder", "stem_conv", "stem_norm")
    for stage, blocks in enumerate(config.depths):
        for i in range(blocks):
            ours, prefix = f"stage{stage}_block{i}", f"encoder.stages.{stage}.layers.{i}"
            for j in range(2 if kind == "basic" else 3):
                convert(f"{prefix}.layer.{j}", f"conv{j + 1}", f"norm{j + 1}", ours)
            if f"{prefix}.shortcut.convolution.weight" in w:
                convert(f"{prefix}.shortcut", "shortcut_conv", "shortcut_norm", ours)

    resnet = ResNet(depth=18 if kind == "basic" else 50, blocks=(1, 2), channels=(8, 16))
    images = np.random.default_rng(0).normal(size=(2, 34, 32, 3)).astype(np.float32)
    check_parameters(resnet, params, images)
    outputs = theirs(model, to_torch(images))
    ours = jax.jit(resnet.apply)({"params": params, "batch_stats": stats}, images)
    scale = float(outputs.last_hidden_state.abs().max())
    close(ours["patches"].transpose(0, 3, 1, 2) / scale, outputs.last_hidden_state / scale)
    close(ours["features"] / scale, outputs.pooler_output[:, :, 0, 0] / scale)
