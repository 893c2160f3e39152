"""The estimate of benchmarks/memory.py against the memory that small models really take."""
import argparse
import runpy
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM

import common
import dpo
import grpo
import reward_model
import sft

MEMORY = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks/memory.py")))
SHAPE = (192, 6, 6, 2, 768, 4096, True)  # as in MEMORY.SHAPES
RANK = 16


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that operations made and that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.live, self.most, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inside = [x.untyped_storage() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        made = function(*args, **kwargs or {})
        for tensor in filter(torch.is_tensor, tree_leaves(made)):
            storage = tensor.untyped_storage()
            if storage not in self.known and not any(storage is other for other in inside):
                self.known.add(storage)
                self.count(storage.nbytes())
                weakref.finalize(storage, self.count, -storage.nbytes())
        return made

    def count(self, size):
        self.live += size
        self.most = max(self.most, self.live)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saves a model of SHAPE with random weights and a vocabulary of that size."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "intermediate_size", "vocab_size", "tie_word_embeddings")

    def save(vocabulary=SHAPE[5]):
        sizes = dict(zip(names, SHAPE, strict=True)) | {"vocab_size": vocabulary}
        config = Qwen2Config(**sizes, max_position_embeddings=2048)
        place = str(tmp_path_factory.mktemp("model"))
        Qwen2ForCausalLM(config).save_pretrained(place)
        common.load_tokenizer("tiny/chat").save_pretrained(place)
        return place
    return save


def loss_of(script, model, count, length):
    """The loss of `count` rows or pairs, all of them `length` tokens long."""
    row = {"input_ids": [7 * i % 60 for i in range(length)], "attention_mask": [1] * length}
    if script != "reward_model":
        row["loss_mask"] = [0] * (length // 4) + [1] * (length - length // 4)
    batch = [{"tokens": row, "chosen": row, "rejected": row, "margin": 0.0}] * count
    if script == "sft":
        return sft.batch_loss(model, batch, 100, 0)
    if script == "dpo":
        args = argparse.Namespace(loss="dpo", beta=0.1, label_smoothing=0.0, gamma=1.0)
        return dpo.pair_losses(model, batch, args, 0)[0].sum()
    args = argparse.Namespace(centering=0.01)
    return reward_model.comparison_losses(model, batch, args, 0)[0].sum()


@pytest.mark.parametrize("script", ["sft", "dpo", "reward_model"])
@pytest.mark.parametrize("count, length, vocabulary", [(2, 384, 4096), (4, 160, 64)])
def test_a_pass_takes_what_was_estimated(script, count, length, vocabulary, folder):
    """Within 15%, without weights and gradients, whether layers or logits are the widest."""
    task = "SEQ_CLS" if script == "reward_model" else "CAUSAL_LM"
    model = common.load_model(folder(vocabulary), "off", RANK, "on", task=task)
    loss_of(script, model, count, length).backward()
    with Peak() as peak:  # of a second micro-batch, when the gradients exist already
        loss_of(script, model, count, length).backward()
    shape, rows = MEMORY.shape(*SHAPE[:5], vocabulary, True), MEMORY.ROWS[script] * count
    # On a CPU, SDPA does not repeat keys and values. Here all positions are one chunk of logits.
    widest = MEMORY.layer(shape, rows, length, 4, four_bit=False, repeated=False)
    if script != "reward_model":
        widest = max(widest, MEMORY.logits(shape, rows * (length - length // 4)))
    expected = MEMORY.checkpoints(shape, rows, length, 4) + widest
    assert peak.most == pytest.approx(expected, rel=0.15), f"peak of {script}, in bytes"


def test_adapter_and_optimizer_take_16_bytes_for_each_weight(folder):
    model = common.load_model(folder(), "off", RANK, "on")
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    taken = sum(x.nbytes for x in [*weights, *moments, *(p.grad for p in weights)])
    assert taken == MEMORY.training(MEMORY.shape(*SHAPE), RANK, 1)


@pytest.mark.parametrize("four_bit", [False, True])
def test_weights_are_those_of_the_model(four_bit, folder):
    """Norms and biases, which the estimate leaves out, take less than 1%."""
    model = common.load_model(folder(), "on" if four_bit else "off", 0, "off", trainable=False)
    taken = sum(p.nbytes for p in model.parameters())
    if four_bit:  # the scales are not parameters
        states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
        taken += sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)
    assert taken == pytest.approx(MEMORY.weights(MEMORY.shape(*SHAPE), 4, four_bit), rel=0.02)


def test_a_cache_holds_keys_and_values_of_all_answers(folder):
    model = common.load_model(folder(), "off", 0, "off", trainable=False)
    tokenizer = common.load_tokenizer("tiny/chat")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with Peak() as peak:
        args = argparse.Namespace(max_new_tokens=120, temperature=1.0)
        grpo.sample(model, tokenizer, [[5] * 20] * 4, 8, args, 0)
    shape = MEMORY.shape(*SHAPE)
    expected = MEMORY.cache(shape, 32, 140, 4) + MEMORY.logits(shape, 32)
    assert peak.most == pytest.approx(expected, rel=0.15), "peak of sampling, in bytes"


def test_a_7b_fits_with_every_scripts_defaults(capsys):
    MEMORY.main(MEMORY.make_flags().parse_args(["--sizes", "7B"]))
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == len(MEMORY.ROWS) and all(line.split()[2] == "yes" for line in lines)


def test_the_largest_batch_fits_and_twice_as_much_does_not():
    model, limit = MEMORY.shape(*MEMORY.SHAPES["3B"]), 13.8 * 2**30
    defaults = grpo.make_flags().parse_args([])
    size = MEMORY.largest(model, "grpo", defaults, "micro_batch_size", limit)
    for micro, fits in (size, True), (2 * size, False):
        args = SimpleNamespace(**vars(defaults) | {"micro_batch_size": micro})
        assert (sum(MEMORY.estimate(model, "grpo", args).values()) <= limit) == fits
