"""Tiny models of the classes users adapt, adapters on them, and one training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from partial_lora.adapter import PartialLoraConfig
from partial_lora.adapter.model import saved_rank

VIT_TARGETS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
LLAMA_TARGETS = ["q_proj", "v_proj", "down_proj"]
HEAD = "timm_model.head"

# Below and above the density at which the forward pass changes its way, and different for rows and columns.
MIXED = {
    "qkv": {"rows": 0.9, "columns": 0.5},
    "attn.proj": {"rows": 0.3, "columns": 0.8},
    "fc1": 0.87,
    "fc2": {"rows": 0.0, "columns": 0.6},
}

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "ls_init_value": 1.0}
DECODER = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


def vit(blocks: int = 1) -> TimmWrapperForImageClassification:
    """A ViT for 32 px images and 4 classes."""
    torch.manual_seed(0)
    size = VIT | {"depth": blocks}
    return TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=4, model_args=size)
    )


def timm_vit() -> torch.nn.Module:
    """The same ViT as timm builds it, without transformers around it."""
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, **VIT)


def timm_convnext() -> torch.nn.Module:
    """A ConvNeXt of four blocks for 32 px images and 4 classes, its branches as heavy as in a trained one."""
    torch.manual_seed(0)
    return timm.create_model("convnext_tiny", num_classes=4, **CONVNEXT)


def convnext() -> ConvNextForImageClassification:
    """A ConvNeXt of two blocks, as transformers builds it."""
    torch.manual_seed(0)
    return ConvNextForImageClassification(
        ConvNextConfig(num_labels=4, num_stages=2, depths=[1, 1], hidden_sizes=[16, 32], layer_scale_init_value=1.0)
    )


def llama() -> LlamaForCausalLM:
    """A Llama of one block over 50 tokens."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**DECODER, num_attention_heads=4, num_key_value_heads=2))


def qwen2() -> Qwen2ForCausalLM:
    """A Qwen2 of one block over 50 tokens: biases in q, k and v, and one tensor for the embeddings and the head."""
    torch.manual_seed(0)
    config = Qwen2Config(**DECODER, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    return Qwen2ForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    """A GPT-2 of one block over 50 tokens; its linear layers are Conv1D, whose weights are in × out."""
    torch.manual_seed(0)
    size = {"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**size, bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    return GPT2LMHeadModel(config)


def deberta() -> DebertaV2ForSequenceClassification:
    """A DeBERTa-v3 of one block over 50 tokens, for 3 classes: its query and key layers run twice in each pass."""
    torch.manual_seed(0)
    config = DebertaV2Config(
        **DECODER,
        num_attention_heads=2,
        max_position_embeddings=16,
        relative_attention=True,
        position_buckets=4,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        type_vocab_size=0,
        position_biased_input=False,
        pad_token_id=0,
        num_labels=3,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
        initializer_range=0.1,
    )
    return DebertaV2ForSequenceClassification(config)


def images(seed: int = 0, count: int = 8) -> dict[str, torch.Tensor]:
    """A batch for the image models of transformers, labels included."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(count, 3, 32, 32, generator=generator),
        "labels": torch.randint(0, 4, (count,), generator=generator),
    }


def timm_images(seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch for the image models of timm, which take no labels."""
    return {"x": images(seed)["pixel_values"]}


def tokens(seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch for the language models, labels included."""
    ids = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def sentences(seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch for the text classifier, padded on the right, labels included."""
    ids = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.tensor([0, 1, 2])}


@dataclass(frozen=True)
class Kind:
    """One class of models: how it is built and fed, what is adapted, and what trains in full beside the adapter."""

    build: Callable[[], torch.nn.Module]
    batch: Callable[[int], dict[str, torch.Tensor]]
    targets: list[str]
    head: list[str] | None = None
    task: str | None = None


KINDS = {
    "wrapped_vit": Kind(vit, images, VIT_TARGETS, [HEAD]),
    "timm_vit": Kind(timm_vit, timm_images, VIT_TARGETS, ["head"]),
    "deberta": Kind(
        deberta, sentences, ["query_proj", "key_proj", "intermediate.dense", "output.dense"], None, "SEQ_CLS"
    ),
    "llama": Kind(llama, tokens, LLAMA_TARGETS, None, "CAUSAL_LM"),
    "qwen2": Kind(qwen2, tokens, ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"], None, "CAUSAL_LM"),
    "gpt2": Kind(gpt2, tokens, ["c_attn", "c_proj", "c_fc"], None, "CAUSAL_LM"),
    "timm_convnext": Kind(timm_convnext, timm_images, ["mlp.fc1", "mlp.fc2", "downsample.1", "stem.0"], ["head.fc"]),
    "convnext": Kind(
        convnext, images, ["pwconv1", "pwconv2", "downsampling_layer.1", "patch_embeddings"], ["classifier"]
    ),
}
KIND_OF = {kind.build: kind for kind in KINDS.values()}


def adapt(base=vit, seed=1, **settings):
    """``base`` with a Partial-LoRA adapter, or with plain LoRA where no sparsity is set."""
    kind = KIND_OF[base]
    settings = {"r": 4, "lora_alpha": 6, "target_modules": kind.targets, "modules_to_save": kind.head, **settings}
    config = (
        PartialLoraConfig(**settings) if "sparsity" in settings or "indices" in settings else LoraConfig(**settings)
    )
    model = base()
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def layers(model):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}


def trainable_parameters(model, adapter_name="default"):
    """Return how many numbers of an adapter train, without a head beside it."""
    named = ((name.split("."), value) for name, value in model.named_parameters() if "lora_" in name)
    return sum(value.numel() for parts, value in named if adapter_name in parts and value.requires_grad)


def fill(model, seed=2, adapter_name=None):
    """Give B values, as training would, or A where B is frozen: of one adapter, or of all."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in layers(model).values():
            for name, factor in layer.lora_B.items():
                if adapter_name in (None, name):
                    for parameter in [*factor.parameters()] or layer.lora_A[name].parameters():
                        parameter.normal_()
    return model


def plain_config(model, name="default"):
    """The config of an adapter as plain PEFT reads it from a file: one rank and one alpha."""
    config = model.peft_config[name]
    return config.as_lora(saved_rank(model, name)) if isinstance(config, PartialLoraConfig) else config


def dense_twin(model, base, **settings):
    """``base`` with plain LoRA adapters of the same names that hold the dense tensors of ``model``'s, the head too."""
    configs = {name: plain_config(model, name) for name in model.peft_config}
    for config in configs.values():
        for option, value in settings.items():
            setattr(config, option, value)
    first, *others = configs
    twin = get_peft_model(base(), configs[first], adapter_name=first)
    for name in others:
        twin.add_adapter(name, configs[name])
    for name in configs:
        result = set_peft_model_state_dict(twin, get_peft_model_state_dict(model, adapter_name=name), name)
        assert not result.unexpected_keys
        scaled_as(model, twin, name)
    twin.set_adapter(model.active_adapter)
    return twin


def scaled_as(model, twin, name="default"):
    """Give ``twin``, read from a file of ``model``, the scalings that this trains with: in the file they are in B."""
    own = layers(model)
    for module, layer in layers(twin).items():
        if name in layer.lora_B:
            scaling = own[module].scaling[name] * getattr(own[module].lora_B[name], "multiple", 1)
            ratio = scaling / layer.scaling[name]
            layer.scaling[name] *= ratio
            for parameter in layer.lora_B[name].parameters():
                parameter.data /= ratio


def redrawn(base=vit):
    """The same shapes with other weights."""
    model = base()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9))
    return model


def optimizer_of(model, lr=0.02):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)


def loss_of(model, batch):
    """The model's own loss, or one of the logits where it has none."""
    output = model(**batch)
    return F.cross_entropy(output, torch.arange(len(output)) % 4) if torch.is_tensor(output) else output.loss


def step(model, optimizer, *batches, prepare=lambda: None):
    """One training step over micro-batches whose gradients add up, clipped; gives the loss."""
    model.train()
    total = 0.0
    for batch in batches:
        loss = loss_of(model, batch) / len(batches)
        loss.backward()
        total += loss.item()
    prepare()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.5)
    optimizer.step()
    optimizer.zero_grad()
    return total


def to(batch, dtype):
    """The batch with its floating-point tensors in ``dtype``."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        output = model(**batch)
    return output if torch.is_tensor(output) else output.logits
