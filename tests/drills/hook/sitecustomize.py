"""Faults in the fake engine, and short patience, for every Python process of a drill; the package has no hook.

Python imports this module at its start when its folder is on PYTHONPATH. $DRILL names a JSON file:

    delay     seconds for each request
    slow      how many times as long the first process that answers takes (its pid goes to $DRILL.slow)
    poison    text of a prompt; what happens at it: die = "exit", the process, or "engine", the engine alone
    lost      seconds of silence after which a rank is taken for dead
"""

import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from pathlib import Path

SAID = json.loads(Path(os.environ["DRILL"]).read_text()) if os.environ.get("DRILL") else {}


def spoil(module):
    whole = module.FakeEngine.generate
    delay = []

    def generate(self, requests, sampling, finished):
        if not delay:
            delay.append(SAID.get("delay", 0.0) * (SAID["slow"] if "slow" in SAID and first() else 1))
        found = []
        for number, request in enumerate(requests):
            module.interrupts.check()
            time.sleep(delay[0])
            poison(self.tokenizer.decode(request.prompt_token_ids))

            def told(_, completions, number=number):
                finished(number, completions)

            found += whole(self, [request], sampling, told)
        return found

    module.FakeEngine.generate = generate
    module.FakeEngine.swap = swap


def first():
    """Whether this is the first process that answers."""
    try:
        file = os.open(f"{os.environ['DRILL']}.slow", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    os.write(file, str(os.getpid()).encode())
    return True


def poison(text):
    if "poison" in SAID and SAID["poison"] in text:
        with open(f"{os.environ['DRILL']}.deaths", "a") as file:
            file.write(f"{os.getpid()}\n")
        if SAID["die"] == "exit":
            os._exit(77)
        from selfimprove.engine.protocol import EngineDied

        raise EngineDied("the engine of the drill died", "it does so on purpose")


def swap(self, model):
    """Without transformers, whose import takes longer than a drill."""
    from selfimprove.store import model_identity

    self._identity, self.tokenizer = model_identity(model), Tokens(model)
    self._codec = self.tokenizer


class Tokens:
    def __init__(self, model):
        import tokenizers

        self.inner = tokenizers.Tokenizer.from_file(f"{model}/tokenizer.json")

    def decode(self, ids, skip_special_tokens=True):
        return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)

    def decode_many(self, sequences):
        return [self.decode(ids) for ids in sequences]

    def encode(self, text, add_special_tokens=False):
        return self.inner.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_many(self, texts):
        return [self.encode(text) for text in texts]


def hasten(module):
    module.LOST, module.BEAT = SAID["lost"], SAID["lost"] / 10


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        patch = PATCHES.get(name)
        spec = patch and importlib.machinery.PathFinder.find_spec(name, path)
        if spec:
            run = spec.loader.exec_module

            def execute(module):
                run(module)
                patch(module)

            spec.loader.exec_module = execute
        return spec


PATCHES = {"selfimprove.engine.fake_engine": spoil}
if "lost" in SAID:
    PATCHES["selfimprove.execution.board"] = hasten
sys.meta_path.insert(0, Finder())
