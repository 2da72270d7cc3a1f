"""What the directory of a judge's model must hold: read, and said, before anything is loaded."""

from pathlib import Path
from typing import Any

from selfimprove import recipe, textfile
from selfimprove.errors import UserError

SAFE: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}  # of every from_pretrained of weights


def context_length(model: Path, section: recipe.Engine) -> int:
    """The tokens that one sequence of a model may have: engine.max_model_len, or its own positions where fewer."""
    config = configuration(model)
    positions = config.get("text_config", config).get("max_position_embeddings")
    return section.max_model_len if positions is None else min(section.max_model_len, int(positions))


def check_weights(model: Path) -> None:
    """Refuse a directory without safetensors: whoever opens a pickle runs what is written in it.

    Raises:
        UserError: no .safetensors file.
    """
    if list(model.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in model.glob(pattern))
    raise UserError(
        f"model {model} has no .safetensors weights" + (f", only {pickled[0]}" if pickled else ""),
        "load it where you trust it and save it with save_pretrained, which writes safetensors",
    )


def check_policy(model: Path) -> None:
    """Refuse what transformers cannot load as a causal language model: it would not be trained.

    Raises:
        UserError: no config.json, of an architecture that this version does not know, or with values that it refuses.
    """
    from transformers import AutoModelForCausalLM, __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    kind = str(configuration(model).get("model_type"))
    if kind not in KNOWN:
        raise UserError(
            f"model {model} is of type '{kind}', which transformers {__version__} does not know as a causal language"
            " model",
            "take another model, or a version of transformers that knows it",
        )
    built(model, AutoModelForCausalLM)


def built(model: Path, automatic: Any) -> Any:
    """The model that a config.json describes, without memory for its weights.

    Args:
        model: its directory.
        automatic: the class of transformers that chooses the model's own.

    Raises:
        UserError: a value in it that the architecture does not take.
    """
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
        with torch.device("meta"):
            return automatic.from_config(config, dtype=torch.float32)
    except Exception as error:  # each architecture has code of its own that meets a wrong value in its own way
        said = " ".join(str(error).split()) or "no reason given"
        raise UserError(
            f"the config.json of model {model} describes no model: {type(error).__name__}: {said}",
            "mend that value, or take the config.json that the model was published with",
        ) from None


def check_reward_model(model: Path) -> None:
    """Refuse what is no sequence classifier of one label that transformers itself knows.

    Raises:
        UserError: another architecture, a model with code of its own, several labels, no safetensors, or a head without
            weights.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as KNOWN

    config = configuration(model)
    named = _architecture(config)
    if "AutoModelForSequenceClassification" in config.get("auto_map", {}):
        raise UserError(f"reward model {model} needs code of its own (trust_remote_code), which is not run", _FITTING)
    if KNOWN.get(config.get("model_type")) != named:
        raise UserError(f"{model} is no reward model: its architecture is {named}", _FITTING)
    labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)  # 2: transformers' own
    if labels != 1:
        raise UserError(f"reward model {model} has {labels} labels, a reward is one number", _FITTING)
    check_weights(model)
    if missing := _head_weights(model) - _weight_names(model):  # vLLM would serve what the memory happened to hold
        raise UserError(
            f"reward model {model} has no weights for {min(missing)}",
            "save it with save_pretrained after it was trained",
        )


def check_ranker(model: Path) -> None:
    """Refuse what is not of the form of PairRM-hf (see ranker.py).

    Raises:
        UserError: another architecture, a missing prefix id, no tokenizer.json, or no safetensors.
    """
    config = configuration(model)
    if _architecture(config) != "DebertaV2PairRM":
        raise UserError(f"{model} is no pairwise ranker: its architecture is {_architecture(config)}", _PAIRRM)
    missing = [name for name in PREFIXES if not isinstance(config.get(name), int)]
    if missing:
        raise UserError(f"the config of ranker {model} has no {missing[0]}", _PAIRRM)
    if config.get("position_biased_input", True):
        raise UserError(f"ranker {model} has absolute positions (position_biased_input)", _PAIRRM)
    if not (model / "tokenizer.json").is_file():
        raise UserError(f"ranker {model} has no tokenizer.json", _PAIRRM)
    check_weights(model)


PREFIXES = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")
_FITTING = "name a model whose architecture ends in ForSequenceClassification, num_labels = 1"
_PAIRRM = "name a directory of the form of llm-blender/PairRM-hf"


def _head_weights(model: Path) -> set[str]:
    """The names of a classifier's weights that are not its body's."""
    from transformers import AutoModelForSequenceClassification

    empty = built(model, AutoModelForSequenceClassification)
    return {name for name in empty.state_dict() if not name.startswith(f"{empty.base_model_prefix}.")}


def _weight_names(model: Path) -> set[str]:
    from safetensors import safe_open

    names: set[str] = set()
    for file in model.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            names |= set(weights.keys())
    return names


def _architecture(config: dict[str, Any]) -> str:
    return str((config.get("architectures") or ["unknown"])[0])


def configuration(model: Path) -> dict[str, Any]:
    """The content of a model's config.json.

    Raises:
        UserError: it cannot be read, or is no JSON object.
    """
    try:
        config = textfile.parse_json(textfile.read(model / "config.json"))
    except (UserError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"model {model} has no config.json that can be read", "save it with save_pretrained")
    return config
