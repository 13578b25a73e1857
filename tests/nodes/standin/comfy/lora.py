"""LoRAs by the names of a module's weights."""

KEYS = ("alpha", "lora_A.weight", "lora_B.weight")


def model_lora_keys_unet(model, key_map):
    assert "num_res_blocks" not in model.model_config.unet_config
    names = (name for name in model.state_dict() if name.startswith("diffusion_model.") and name.endswith(".weight"))
    return {**key_map, **{name.removesuffix(".weight"): name for name in names}}


def load_lora(lora, to_load):
    """Factors and alpha by the weight's name."""
    layers = {name.partition(".lora_A")[0] for name in lora if ".lora_A" in name}
    return {to_load[name]: [lora[f"{name}.{key}"] for key in KEYS] for name in layers if name in to_load}


def calculate_weight(patches, weight, key):
    for strength, (alpha, down, up) in patches:
        weight = weight + (strength * alpha.item() / len(down) * up @ down).to(weight)
    return weight
