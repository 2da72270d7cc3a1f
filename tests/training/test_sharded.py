"""Models cut into parts are those of their directories, whatever the family; none is whole in a process."""

import json

import torch
import transformers

from selfimprove.training import distributed, export, sharded
from selfimprove.training.logps import Scorer
from tests.training import families
from tests.training.conftest import tiny
from tests.training.processes import run

FAMILIES = [*families.PACKED, *families.PADDED]


def scored(scorer):
    scorer.use("padded")
    with torch.no_grad():
        return scorer(scorer.pack(families.TREES)).logps


def compare(world, folder, names):
    """In each process: cut the model, compare it with the directory's; the first writes down what it found."""
    handed_out, found = [], {}
    hand_out = sharded._hand_out
    sharded._hand_out = lambda *arguments: (handed_out.append(True), hand_out(*arguments))
    for name in names:
        handed_out.clear()
        directory = folder / name
        model = sharded.skeleton(directory)
        assert all(parameter.is_meta for parameter in model.parameters())
        scorer = Scorer(model.eval())
        module = distributed.wrap(scorer, sharded.layers(scorer.body), "fsdp", world, torch.float32)
        sharded.load(module, model, directory, world)
        held = sum(p.to_local().numel() for p in model.parameters())
        logps = scored(scorer)
        distributed.reshard(module)
        whole = sharded.whole(model, directory, world)
        assert (whole is not None) == world.first
        if world.first:
            plain = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
            one, other = plain.state_dict(), whole.state_dict()
            buffers, others = dict(plain.named_buffers()), dict(model.named_buffers())
            found[name] = {
                "same": one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one),
                "same buffers": buffers.keys() == others.keys()
                and all(torch.equal(buffers[key], others[key]) for key in buffers),
                "tied": len(dict(plain.named_parameters())) == len(dict(whole.named_parameters())),
                "difference": (scored(Scorer(plain)) - logps).abs().max().item(),
                "held": held / sum(p.numel() for p in plain.parameters()),
                "handed out": bool(handed_out),
            }
    if world.first:
        (folder / "found.json").write_text(json.dumps(found))


def found(folder, names):
    assert run(2, compare, folder, names) == [0, 0]
    return json.loads((folder / "found.json").read_text())


CONVERTED = {"qwen 3 moe", "mixtral", "jamba", "qwen 3 next"}  # experts lie in files one by one, in models as one


def test_every_family_is_read_in_parts_and_given_whole(tmp_path):
    for name in FAMILIES:
        families.build(name).save_pretrained(tmp_path / name)
    tiny().bfloat16().save_pretrained(tmp_path / "bfloat16 in several files", max_shard_size="10KB")
    tiny().model.save_pretrained(tmp_path / "without its head")  # tied to its embeddings, whose name differs
    assert len(list((tmp_path / "bfloat16 in several files").glob("*.safetensors"))) > 2
    every = found(tmp_path, [*FAMILIES, "bfloat16 in several files", "without its head"])
    for name, one in every.items():
        assert one["same"], name
        assert one["same buffers"], name
        assert one["tied"], name
        assert one["difference"] < 1e-5, name
        assert one["held"] < 0.51, name
    assert {name for name, one in every.items() if one["handed out"]} == {*CONVERTED, "without its head"}


def test_a_large_model_is_written_in_several_files_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD", "10KB")
    tiny().save_pretrained(tmp_path / "start")
    export.save(tiny(seed=1), tmp_path / "out", tmp_path / "start")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in tiny(seed=1).state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
